"""How the trainer works with one block of several in this process, and the others in other processes.

Each part of it is a file: `stationed` for the place of a process, `running` for training, `company` for what several
processes with the same block owe each other, `predicting` for evaluations and `keeping` for checkpoints.
"""

from __future__ import annotations

from hf_blocklocal.trainer.company import KeepsCompany
from hf_blocklocal.trainer.keeping import KeepsApart
from hf_blocklocal.trainer.predicting import PredictsApart


class PlacesBlocks(KeepsCompany, PredictsApart, KeepsApart):
    """Trains one block per process, where the config asks for it. Without, every method is the parent's."""
