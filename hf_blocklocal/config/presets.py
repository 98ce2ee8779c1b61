"""Configurations that have a name: what papers did, and ordinary backpropagation."""

from __future__ import annotations

from typing import Any


_PUBLISHED = {"block_lr_decay": 1.0}
PRESETS: dict[str, dict[str, Any]] = {
    # Nokland & Eidnes (2019), arXiv 1901.06656: a linear classifier on the output of each block.
    "pred": _PUBLISHED | {"feedback": "label", "loss": "agreement"},
    # The same paper: similarity matching, in place of that classifier or beside it.
    "sim": _PUBLISHED | {"feedback": "label", "loss": "agreement", "sim": 1.0},
    "predsim": _PUBLISHED | {"feedback": "label", "loss": "agreement", "sim": 0.99},
    # Kappel et al. (2023), arXiv 2305.14974: what their public experiments do.
    "kappel2023": _PUBLISHED | {"feedback": "prototype", "loss": "kappel2023", "denoising": 1.0},
    # Belilovsky et al. (2020), arXiv 1901.08164: a classifier with a hidden layer on the output of each block.
    "dgl": _PUBLISHED | {"feedback": "label", "loss": "agreement", "readout": "mlp"},
    # Gomez et al. (2020), arXiv 2010.04116: linear classifiers, and the loss of a block teaches the one below it too.
    "interlocking": _PUBLISHED | {"overlap": 1, "feedback": "label", "loss": "agreement"},
    # One block: exactly the plain Trainer.
    "backprop": {"num_blocks": 1},
}
