"""Load a model from the Hub where hf_blocklocal cannot be imported; leave its logits and what a pipeline says.

Usage: without_package.py REPO FOLDER, where the folder holds `batch.pt`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, pipeline


class Refuse:
    """Lets nobody import the package."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Refuse the package, and leave all others to the other finders."""
        if name.partition(".")[0] == "hf_blocklocal":
            raise ImportError(f"{name} must not be needed")


def main() -> None:
    """Load, compute, and write down."""
    repo, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    sys.meta_path.insert(0, Refuse())
    model = AutoModelForSequenceClassification.from_pretrained(repo)
    with torch.no_grad():
        torch.save(model(**torch.load(folder / "batch.pt")).logits, folder / "logits.pt")
    answer = pipeline(model=repo)("word7 word8")[0]
    (folder / "answer.json").write_text(json.dumps(answer))
    assert "hf_blocklocal" not in sys.modules


if __name__ == "__main__":
    main()
