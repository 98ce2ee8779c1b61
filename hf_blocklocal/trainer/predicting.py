"""How the trainer evaluates and predicts with a block per process: every process gets what the last block says."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from hf_blocklocal.anatomy.lending import taken_by
from hf_blocklocal.cut.blocks import EndOfBlock
from hf_blocklocal.parallel.giving import share_from_last
from hf_blocklocal.parallel.pooling import gather_samples, sum_over_blocks
from hf_blocklocal.randomness import RandomState
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
        if not self._chain.is_last:
            with suppress(EndOfBlock), torch.no_grad(), self.compute_loss_context_manager():
                model(**taken_by(self.model, inputs))
        if ignore_keys is None:
            config = getattr(self.model, "config", None)
            ignore_keys = getattr(config, "keys_to_ignore_at_inference", ["past_key_values"])
        ignored = [*ignore_keys, *self._stationing.unknown_outputs]
        return self._as_last_says(super().prediction_step, model, inputs, prediction_loss_only, ignored, **kwargs)

    def _as_last_says(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a function where the last block is, and return in all processes of the chain what it returns there."""
        said = function(*args, **kwargs) if self._chain.is_last else None
        shared = share_from_last(self._chain, said, self.args.device)
        return said if self._chain.is_last else shared

    def _cut_here(self) -> Any:
        """Cut the forward pass that runs inside the `with`, if this process has but one block."""
        if self._chain is None:
            return nullcontext()
        return self.assembly.step.boundaries.attached(lambda *_: None)

    def _whole_at_last(self) -> AbstractContextManager[None]:
        """Bring what all blocks have to the process with the last one inside the `with`, if they are apart."""
        return nullcontext() if self._chain is None else self._stationing.brought_to_last()

    def _go_on_as_last(self) -> None:
        """Take over what generating has changed where the last block is: random numbers, and the generation config."""
        if self._chain is None:
            return
        config = self.model.generation_config
        drawn = RandomState.now(self.args.device)
        said = (drawn.cpu, drawn.on_device, config.to_json_string(use_diff=False))
        on_cpu, on_device, text = self._as_last_says(
            lambda: tuple(state.to(self.args.device) if isinstance(state, Tensor) else state for state in said)
        )
        if not self._chain.is_last:
            RandomState(on_cpu.cpu(), self.args.device, None if on_device is None else on_device.cpu()).set()
            self.model.generation_config = type(config).from_dict(json.loads(text))

    def whole_model(self) -> nn.Module:
        """Return the whole model as it is now, for example to generate with: in every process, on its device.

        With all blocks in one process that is the model that is trained; else it is a copy of it. All processes must
        call it together.
        """
        if self._chain is None:
            return self.model
        with self._session():
            return self._stationing.whole_model().to(self.args.device)
