"""Callbacks that look at a run block by block and change nothing in it.

Each is made with the trainer that it looks at and added to it before training:
`trainer.add_callback(DriftCallback(trainer))`. What they see goes through `Trainer.log`, so it is in
`state.log_history`, in `trainer_state.json` and with every tracker, one key per block: `drift/block_0`.
"""

from __future__ import annotations

from hf_blocklocal.callbacks.alignment import GradientAlignmentCallback
from hf_blocklocal.callbacks.base import BlockCallback
from hf_blocklocal.callbacks.drift import DriftCallback
from hf_blocklocal.callbacks.linear_probe import LinearProbeCallback


__all__ = ["BlockCallback", "DriftCallback", "GradientAlignmentCallback", "LinearProbeCallback"]
