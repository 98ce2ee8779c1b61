"""What a subclass of the trainer may replace, and what is said where its own method leaves out what it replaces."""

from __future__ import annotations

import logging
from itertools import takewhile
from typing import Any

from hf_blocklocal.errors import UnsupportedSettingError
from hf_blocklocal.optim.groups import has_rates_of_blocks
from hf_blocklocal.trainer.spreading import SpreadsBlocks


logger = logging.getLogger(__name__)

_TEACHES = (
    "super().training_step(model, inputs, num_items_in_batch), which runs the model once and teaches each block where "
    "it ends."
)


class ChecksOverrides(SpreadsBlocks):
    """Looks, once a run, whether blocks are taught and heads are optimized."""

    _has_taught = False

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Say what a loss of the subclass teaches, and what is behind an error of its own training step."""
        self._has_taught = False
        if self.block_local.num_blocks > 1 and self._overrides("compute_loss"):
            logger.warning(
                "%s.compute_loss teaches the last block alone; the heads of the others learn to predict the labels by "
                "a loss of their own. A compute_loss_func teaches them too, where a sample has one target.",
                type(self).__name__,
            )
        try:
            return super().train(*args, **kwargs)
        except RuntimeError as error:
            if not self._has_taught and self._overrides("training_step") and hasattr(error, "add_note"):
                error.add_note(
                    f"No block had been taught. If {type(self).__name__}.training_step has failed, the reason may be "
                    f"that it does not call {_TEACHES}"
                )
            raise

    def _overrides(self, name: str) -> bool:
        """Tell whether a subclass replaces one of the trainer's methods."""
        own = takewhile(lambda kind: not kind.__module__.startswith("hf_blocklocal."), type(self).__mro__)
        return any(name in vars(kind) for kind in own)

    def _check_overrides(self) -> None:
        """Refuse an optimizer that leaves out the heads, or holds what is elsewhere; called by every training step.

        Raises:
            UnsupportedSettingError: If the optimizer of a subclass does.
        """
        if self._has_taught:
            return
        self._has_taught = True
        if self.assembly.last == 0:
            return
        made_by = f"The optimizer that {type(self).__name__}.create_optimizer has made"
        if self._chain is not None and not self._is_own_shard(self._inner_optimizer):
            raise UnsupportedSettingError(
                f"{made_by} holds parameters of all blocks, and with block_parallel_size above 1 this process has "
                "those of one. Call super().create_optimizer() there, name the optimizer by optim, or pass "
                "optimizer_cls_and_kwargs."
            )
        known = {id(parameter) for group in self._inner_optimizer.param_groups for parameter in group["params"]}
        heads, originals = self.assembly.heads.named_parameters(), self.assembly.originals
        left_out = [
            f"heads.{name}"
            for name, parameter in heads
            if parameter.requires_grad
            and not parameter.is_meta
            and id(parameter) not in known
            # A copy of a weight that is not optimized need not be either.
            and (parameter not in originals or id(originals[parameter]) in known)
        ]
        if left_out:
            raise UnsupportedSettingError(
                f"{made_by} leaves out {len(left_out)} parameters of the heads that teach the blocks, such as "
                f"{left_out[0]}. Call super().create_optimizer() there, or optimize "
                "self.assembly.module.parameters(), which are those of the model and its heads."
            )
        if self._overrides("create_optimizer"):
            self._check_rates(made_by)

    def _check_rates(self, made_by: str) -> None:
        """Refuse an optimizer without the rates that were asked for; of those that were not, a warning says so."""
        decay = self.assembly.config.block_lr_decay
        if decay in (None, 1.0) or has_rates_of_blocks(self._inner_optimizer):
            return
        call = "Call self.assembly.set_learning_rates_(optimizer) there"
        if self.assembly.chooses_rates:
            raise UnsupportedSettingError(
                f"{made_by} knows nothing of block_lr_decay={decay}. {call}, or leave the option out."
            )
        logger.warning(
            "%s has rates of its own; by default, lower blocks of a pretrained model learn at smaller ones. %s.",
            made_by,
            call,
        )
        self._learn_at_one_rate()

    def _check_taught(self) -> None:
        """Refuse to step blocks that have not been taught; called before every step of the optimizer.

        Raises:
            UnsupportedSettingError: If a training step of the subclass is in the place of the trainer's.
        """
        if self.block_local.num_blocks > 1 and not self._has_taught:
            raise UnsupportedSettingError(
                f"{type(self).__name__}.training_step has taught no block by its own loss: it does not call "
                f"{_TEACHES} Call it, or use num_blocks=1."
            )
