"""Local losses, one per file. To add one: a subclass of `LocalLoss`, a line below, a test."""

from __future__ import annotations

from hf_blocklocal.losses.agreement import Agreement
from hf_blocklocal.losses.base import LocalLoss, Messages
from hf_blocklocal.losses.contrast import Contrast
from hf_blocklocal.losses.kappel import Kappel2023
from hf_blocklocal.losses.reconstruction import Reconstruction
from hf_blocklocal.losses.sim import SimilarityMatching


LOSSES: dict[str, type[LocalLoss]] = {"agreement": Agreement, "contrast": Contrast, "kappel2023": Kappel2023}

__all__ = [
    "LOSSES",
    "Agreement",
    "Contrast",
    "Kappel2023",
    "LocalLoss",
    "Messages",
    "Reconstruction",
    "SimilarityMatching",
]
