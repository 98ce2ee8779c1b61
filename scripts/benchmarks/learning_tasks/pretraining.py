"""Backpropagation with the plain Trainer, silent: how starting models are made."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any


def pretrain_(model: Any, rows: Sequence[Any], collate: Any, **arguments: Any) -> None:
    """Train a model in place, always in the same way.

    Args:
        model: The model.
        rows: The samples.
        collate: Makes a batch of samples.
        **arguments: Fields of `TrainingArguments`.
    """
    from transformers import PrinterCallback, Trainer

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(model, silent_arguments(folder, **arguments), train_dataset=rows, data_collator=collate)
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def silent_arguments(folder: str, **arguments: Any) -> Any:
    """Return training arguments that log, save and evaluate nothing; bfloat16 where there is a GPU."""
    import torch
    from transformers import TrainingArguments

    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    place = {"bf16": True} if torch.cuda.is_available() else {"use_cpu": True}
    return TrainingArguments(output_dir=folder, **{**quiet, **place, **arguments})
