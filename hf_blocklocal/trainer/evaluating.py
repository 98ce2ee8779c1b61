"""What the trainer does around an evaluation: it scores the head of every block beside the model."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from hf_blocklocal.anatomy.lending import taken_by
from hf_blocklocal.targets.batch import has_labels
from hf_blocklocal.teaching.evaluation import BlockScores
from hf_blocklocal.trainer.spreading import SpreadsBlocks


logger = logging.getLogger(__name__)


class EvaluatesBlocks(SpreadsBlocks):
    """Adds to every evaluation what each block by itself would have predicted."""

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Add to the metrics what each block's head would have predicted."""
        asked = (dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self._assembly is None or self._assembly.last == 0 or not self.block_local.evaluate_blocks:
            return super().evaluation_loop(*asked)
        if self._assembly.copies is not None and not self.is_in_train and self._casts_model:
            logger.warning(
                "The heads of blocks are not scored: fp16_full_eval or bf16_full_eval changes the type of the model, "
                "and not that of the copies that they borrow."
            )
            return super().evaluation_loop(*asked)
        self._scores = BlockScores(self._assembly.step)
        try:
            with self._session():
                self._assembly.begin_step(self.state.global_step)
                output = super().evaluation_loop(*asked)
            self._scores.gather(self._sum_over_blocks)
            output.metrics.update(self._scores.metrics(metric_key_prefix))
        finally:
            self._scores = None
        return output

    @property
    def _casts_model(self) -> bool:
        return self.args.fp16_full_eval or self.args.bf16_full_eval

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Score the heads in the forward pass of the parent's step."""
        if self._scores is None or not has_labels(inputs):
            with self._cut_here():
                return super().prediction_step(model, inputs, *args, **kwargs)
        inputs = self._batch_to_read(inputs)
        with torch.no_grad():
            targets = self.assembly.read_targets(inputs, whole_vocabulary=True)
        with self._scores.watch(targets, taken_by(self.model, inputs)):
            result = super().prediction_step(model, inputs, *args, **kwargs)
        self._scores.add(self._gather_samples(self._scores.batch_BK3))
        return result
