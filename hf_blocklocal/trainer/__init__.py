"""The trainers: those of transformers, with a backward pass per block.

`BlockLocalMixin` is made of classes that do one thing each, by surrounding methods of `Trainer` with `super()`. Where
two surround the same one, the upper in this table is the outer. Those below the line do nothing where all blocks are
in one process and on one device.

    training    BlockLocalMixin   sets up: heads in the optimizer, no DDP; logs the losses of blocks
    overriding  ChecksOverrides   refuses subclasses that leave out what blocks need
    evaluating  EvaluatesBlocks   scores heads beside the model
    saving      SavesBlocks       heads, copies and config in checkpoints
    pushing     PushesRuns        the Hub
    stepping    StepsBlocks       one training step; clipping by block
    scaling     ScalesBlocks      fp16 by block
    --------------------------------------------------------------------------------------------------------
    spreading   SpreadsBlocks     blocks on several devices
    company     KeepsCompany      shared-out blocks, whose layers all run or none
    predicting  PredictsApart     evaluations of a chain
    running     RunsApart         messages around train() and each step; logs of a chain
    resuming    FindsCheckpoints  one checkpoint for all processes
    keeping     KeepsApart        checkpoints of a chain
    stationed   TakesStation      one block for each process
    --------------------------------------------------------------------------------------------------------
    cards       WritesCards       history, figures and model card
"""

from hf_blocklocal.trainer.seq2seq import BlockLocalSeq2SeqTrainer
from hf_blocklocal.trainer.training import BlockLocalMixin, BlockLocalTrainer


__all__ = ["BlockLocalMixin", "BlockLocalSeq2SeqTrainer", "BlockLocalTrainer"]
