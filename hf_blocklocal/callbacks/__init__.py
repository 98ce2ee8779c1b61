"""Callbacks that look at a run block by block and change nothing in it.

`DriftCallback`, `GradientAlignmentCallback` and `LinearProbeCallback` are made with the trainer that they look at and
added to it before training: `trainer.add_callback(DriftCallback(trainer))`. What they see goes through `Trainer.log`,
so it is in `state.log_history`, in `trainer_state.json` and with every tracker, one key per block: `drift/block_0`.
`HistoryCallback` and `ModelCardCallback` are part of every `BlockLocalTrainer`; another one takes their place.
"""

from __future__ import annotations

from hf_blocklocal.callbacks.alignment import GradientAlignmentCallback
from hf_blocklocal.callbacks.base import BlockCallback
from hf_blocklocal.callbacks.drift import DriftCallback
from hf_blocklocal.callbacks.history import HistoryCallback
from hf_blocklocal.callbacks.linear_probe import LinearProbeCallback
from hf_blocklocal.callbacks.model_card import ModelCardCallback


__all__ = [
    "BlockCallback",
    "DriftCallback",
    "GradientAlignmentCallback",
    "HistoryCallback",
    "LinearProbeCallback",
    "ModelCardCallback",
]
