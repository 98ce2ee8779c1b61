"""The trainers: those of transformers, with a backward pass per block."""

from hf_blocklocal.trainer.seq2seq import BlockLocalSeq2SeqTrainer
from hf_blocklocal.trainer.training import BlockLocalMixin, BlockLocalTrainer


__all__ = ["BlockLocalMixin", "BlockLocalSeq2SeqTrainer", "BlockLocalTrainer"]
