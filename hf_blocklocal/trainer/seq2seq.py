"""`BlockLocalSeq2SeqTrainer`: the transformers Seq2SeqTrainer with a backward pass per block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from hf_blocklocal.errors import UnsupportedSettingError
from hf_blocklocal.generation import check_generation
from hf_blocklocal.trainer.training import BlockLocalTrainer


class BlockLocalSeq2SeqTrainer(BlockLocalTrainer, Seq2SeqTrainer):
    """Everything that `BlockLocalTrainer` does, with metrics of texts that the model writes in evaluations.

    Takes `transformers.Seq2SeqTrainingArguments`: with `predict_with_generate` an evaluation hands `compute_metrics`
    what the model has generated. The heads of blocks are scored on the given target texts, as everywhere; they do not
    write.

    Args:
        *args: As for `transformers.Seq2SeqTrainer`.
        **kwargs: As for `transformers.Seq2SeqTrainer`, and `block_local`: how to cut and teach the model.

    Raises:
        UnsupportedSettingError: If texts are to be generated in a way that the model does not support.
        BlockLocalError: As by `BlockLocalTrainer`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.predict_with_generate:
            check_generation(
                self.model, max_length=self.args.generation_max_length, num_beams=self.args.generation_num_beams
            )

    def create_accelerator_and_postprocess(self) -> None:
        """Refuse arguments without the settings for generation before the parent looks for them."""
        if not isinstance(self.args, Seq2SeqTrainingArguments):
            raise UnsupportedSettingError(
                f"BlockLocalSeq2SeqTrainer takes Seq2SeqTrainingArguments, not {type(self.args).__name__}. Pass "
                "those, or use BlockLocalTrainer."
            )
        super().create_accelerator_and_postprocess()

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Score the heads in the forward pass of the given texts alone, not in those that generate others."""
        with self._uncut_generation():
            return super().prediction_step(model, inputs, *args, **kwargs)

    @contextmanager
    def _uncut_generation(self) -> Iterator[None]:
        """Let the model generate inside the `with` as if it were not cut."""
        whole = self.model.generate

        def generate(*args: Any, **kwargs: Any) -> Any:
            scored = self._scores is not None
            with self.assembly.step.boundaries.suspended() if scored else nullcontext():
                return whole(*args, **kwargs)

        self.model.generate = generate
        try:
            yield
        finally:
            del self.model.generate
