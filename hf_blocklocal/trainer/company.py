"""How the trainer runs a micro-batch that has nothing to teach here, since others wait for its layers.

Processes that share out a block bring each of its layers together to run it, so all of them run it or none does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_blocklocal.trainer.stationed import TakesStation


class KeepsCompany(TakesStation):
    """Keeps other processes company, where a block is shared out. Without, every method is the parent's."""

    # Whether a micro-batch is run that has nothing to teach.
    _in_company = False

    def _keeps_company(self, *, learns: bool) -> bool:
        """Tell whether a micro-batch without targets must be run, since others of this block have some."""
        if self._sharded is None:
            return False
        learning = self._sharded.sum(torch.tensor([float(learns)], device=self.args.device))
        return not learns and learning.item() > 0

    def _with_any_labels(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch with labels that count, in place of those that do not."""
        return {**inputs, **{name: torch.zeros_like(inputs[name]) for name in self.label_names if name in inputs}}

    @contextmanager
    def _company(self, keeps_company: bool) -> Iterator[None]:
        """Let the last block learn nothing from its loss inside the `with`, if there is nothing to be learned."""
        if not keeps_company:
            yield
            return
        self._in_company = True
        try:
            with self._sharded.keeping_company():
                yield
        finally:
            self._in_company = False

    def _backward_to_nothing(self, loss: Tensor, **options: Any) -> None:
        """Run a backward pass that leaves gradients of zero."""
        self.accelerator.backward(0 * loss, **options)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Return a loss that leaves gradients of zero, if there is nothing to be learned."""
        if self._in_company:
            return 0 * super().compute_loss(model, inputs, False, None, **kwargs)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch, **kwargs)
