"""The trainer: the transformers Trainer with a backward pass per block."""

from hf_blocklocal.trainer.training import BlockLocalTrainer


__all__ = ["BlockLocalTrainer"]
