"""`BlockLocalSeq2SeqTrainer`: the transformers Seq2SeqTrainer with a backward pass per block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from hf_blocklocal.errors import UnsupportedSettingError
from hf_blocklocal.trainer.generation import check_generation
from hf_blocklocal.trainer.training import BlockLocalTrainer


class BlockLocalSeq2SeqTrainer(BlockLocalTrainer, Seq2SeqTrainer):
    """Everything that `BlockLocalTrainer` does, with metrics of texts that the model writes in evaluations.

    Takes `transformers.Seq2SeqTrainingArguments`: with `predict_with_generate` an evaluation hands `compute_metrics`
    what the model has generated. The heads of blocks are scored on the given target texts, as everywhere; they do not
    write. With a block per process, the one with the last block generates, and has the weights of all blocks for as
    long as the evaluation lasts.

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

    def evaluation_loop(
        self, dataloader: Any, description: str, prediction_loss_only: bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Let one process of a chain have the whole model for as long as it may have to generate."""
        # The parent gathers samples that only fill a batch too, and so counts some twice.
        self.gather_function = partial(
            self.accelerator.gather_for_metrics, use_gather_object=self.args.eval_use_gather_object
        )
        losses_alone = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        writes = self.args.predict_with_generate and not losses_alone
        with self._session(), self._whole_at_last() if writes else nullcontext():
            return super().evaluation_loop(dataloader, description, prediction_loss_only, *args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        """Score the heads in the forward pass of the given texts alone, not in those that generate others."""
        writes = self.args.predict_with_generate and not prediction_loss_only
        with self._uncut_generation():
            if writes and self._chain is not None and "labels" not in inputs:
                step = partial(Seq2SeqTrainer.prediction_step, self)  # nothing but generation: no block has a part
                result = self._as_last_says(step, model, inputs, prediction_loss_only, *args, **kwargs)
            else:
                result = super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        if writes:
            self._go_on_as_last()
        return result

    @contextmanager
    def _uncut_generation(self) -> Iterator[None]:
        """Let the model generate inside the `with` as if it were not cut."""
        whole = self.model.generate

        def generate(*args: Any, **kwargs: Any) -> Any:
            with self._uncut():
                return whole(*args, **kwargs)

        self.model.generate = generate
        try:
            yield
        finally:
            del self.model.generate

    def _uncut(self) -> AbstractContextManager[None]:
        if self._chain is not None:
            return self._stationing.as_whole()
        return nullcontext() if self._scores is None else self.assembly.step.boundaries.suspended()
