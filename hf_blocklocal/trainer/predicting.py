"""How the trainer evaluates and predicts with a block per process: every process gets what the last block says."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_pt_utils import nested_detach

from hf_blocklocal.blocks import EndOfBlock
from hf_blocklocal.parallel.gathering import gather_samples, share_from_last, sum_over_blocks
from hf_blocklocal.trainer.running import RunsApart


class PredictsApart(RunsApart):
    """Predicts with the whole chain, and gathers over the copies of a block alone."""

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Gather over the copies of the last block alone."""
        if self._chain is not None:
            self.gather_function = self._gather_samples
        with self._session():
            return super().evaluation_loop(*args, **kwargs)

    def _gather_samples(self, value: Any) -> Any:
        if self._chain is None:
            return self.accelerator.gather_for_metrics(value)
        return gather_samples(self._chain, value, self.accelerator.gradient_state)

    def _sum_over_blocks(self, values: Tensor) -> Tensor:
        return values if self._chain is None else sum_over_blocks(self._chain, values)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the block that is here; every process of a chain gets what the last one has predicted."""
        if self._chain is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **kwargs)
        inputs = self._prepare_inputs(inputs)
        self._announce(inputs, "evaluation")
        if self._chain.is_last:
            if ignore_keys is None:
                config = getattr(self.model, "config", None)
                ignore_keys = getattr(config, "keys_to_ignore_at_inference", ["past_key_values"])
            ignored = [*ignore_keys, *self._stationing.unknown_outputs]
            loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignored, **kwargs)
            share_from_last(self._chain, (loss, logits), self.args.device)
            return loss, logits, labels
        with suppress(EndOfBlock), torch.no_grad(), self.compute_loss_context_manager():
            model(**inputs)
        loss, logits = share_from_last(self._chain, None, self.args.device)
        labels = tuple(nested_detach(inputs[name]) for name in self.label_names if inputs.get(name) is not None)
        with_labels = not prediction_loss_only and len(labels) == len(self.label_names) > 0
        return loss, logits, (labels if len(labels) > 1 else labels[0]) if with_labels else None

    def _cut_here(self) -> Any:
        """Cut the forward pass that runs inside the `with`, if this process has but one block."""
        if self._chain is None:
            return nullcontext()
        return self.assembly.step.boundaries.attached(lambda *_: None)

    def whole_model(self) -> nn.Module:
        """Return the whole model as it is now, for example to generate with: in every process, on its device.

        With all blocks in one process that is the model that is trained; else it is a copy of it. All processes must
        call it together.
        """
        if self._chain is None:
            return self.model
        with self._session():
            return self._stationing.whole_model().to(self.args.device)
