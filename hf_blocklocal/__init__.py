"""Train any Hugging Face transformer block by block, each block from its own loss."""

from __future__ import annotations

from hf_blocklocal.anatomy import Stack, find_stacks
from hf_blocklocal.assembly import Assembly, TaughtModel, assemble
from hf_blocklocal.attaching import load_heads
from hf_blocklocal.blocks import Boundaries, Cut
from hf_blocklocal.config import BlockLocalConfig
from hf_blocklocal.depth import EarlyExit, early_exit, truncate
from hf_blocklocal.errors import BlockLocalError
from hf_blocklocal.feedback import FeedbackHead, build_head
from hf_blocklocal.losses import LocalLoss
from hf_blocklocal.partition import Span
from hf_blocklocal.step import LocalStep, StepReport
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
    "find_stacks",
    "load_heads",
    "truncate",
]
