"""Train any Hugging Face transformer block by block, each block from its own loss.

A public name is imported when it is first asked for, so that figures, plans and pushes do not wait for the trainer.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from hf_blocklocal.anatomy.layers import Stack, find_stacks
    from hf_blocklocal.assembling import assemble
    from hf_blocklocal.assembly import Assembly
    from hf_blocklocal.attaching import load_heads
    from hf_blocklocal.config.block_local import BlockLocalConfig
    from hf_blocklocal.cut.blocks import Boundaries, Cut
    from hf_blocklocal.cut.partition import Span
    from hf_blocklocal.depth import EarlyExit, early_exit, truncate
    from hf_blocklocal.errors import BlockLocalError
    from hf_blocklocal.feedback import FeedbackHead, build_head
    from hf_blocklocal.hub import fetch
    from hf_blocklocal.losses import LocalLoss
    from hf_blocklocal.teaching.report import StepReport
    from hf_blocklocal.teaching.step import LocalStep
    from hf_blocklocal.teaching.taught_model import TaughtModel
    from hf_blocklocal.trainer import BlockLocalMixin, BlockLocalSeq2SeqTrainer, BlockLocalTrainer


__version__ = "0.1.0"

__all__ = [
    "Assembly",
    "BlockLocalConfig",
    "BlockLocalError",
    "BlockLocalMixin",
    "BlockLocalSeq2SeqTrainer",
    "BlockLocalTrainer",
    "Boundaries",
    "Cut",
    "EarlyExit",
    "FeedbackHead",
    "LocalLoss",
    "LocalStep",
    "Span",
    "Stack",
    "StepReport",
    "TaughtModel",
    "assemble",
    "build_head",
    "early_exit",
    "fetch",
    "find_stacks",
    "load_heads",
    "truncate",
]

_MODULES = {
    "anatomy.layers": ("Stack", "find_stacks"),
    "assembling": ("assemble",),
    "assembly": ("Assembly",),
    "attaching": ("load_heads",),
    "cut.blocks": ("Boundaries", "Cut"),
    "config.block_local": ("BlockLocalConfig",),
    "depth": ("EarlyExit", "early_exit", "truncate"),
    "errors": ("BlockLocalError",),
    "feedback": ("FeedbackHead", "build_head"),
    "hub": ("fetch",),
    "losses": ("LocalLoss",),
    "cut.partition": ("Span",),
    "teaching.report": ("StepReport",),
    "teaching.step": ("LocalStep",),
    "teaching.taught_model": ("TaughtModel",),
    "trainer": ("BlockLocalMixin", "BlockLocalSeq2SeqTrainer", "BlockLocalTrainer"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name from its module, the first time that it is asked for."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    """Return what is there, whether it has been asked for or not."""
    return sorted({*globals(), *__all__})
