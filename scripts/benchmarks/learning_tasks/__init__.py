"""The tasks of the learning benchmark. To add one: a subclass of `Task` in a file of its own, and a line below."""

from __future__ import annotations

from learning_tasks.base import Data, Metric, Task, load_data, load_fingerprint
from learning_tasks.deciphering import Deciphering
from learning_tasks.images import Images
from learning_tasks.language_model import LanguageModel
from learning_tasks.reversal import Reversal
from learning_tasks.text_classification import TextClassification


# For one modern GPU: 120 million parameters, all of it within ten minutes there.
LARGE_LANGUAGE_MODEL = LanguageModel(
    blocks=(2, 4),
    rates=(5e-5, 1.5e-4, 4.5e-4),
    budget={"num_train_epochs": 2, "per_device_train_batch_size": 16, "warmup_steps": 0.1},
    layers=16,
    width=768,
    heads=12,
    vocabulary=8192,
    context=256,
    pretraining_chunks=12_000,
    pretraining={
        "num_train_epochs": 2,
        "per_device_train_batch_size": 32,
        "learning_rate": 5e-4,
        "warmup_steps": 0.05,
        "lr_scheduler_type": "cosine",
        "seed": 0,
    },
)
SIZES: dict[str, dict[str, Task]] = {
    "small": {
        task.name: task for task in (TextClassification(), LanguageModel(), Images(), Reversal(), Deciphering())
    },
    "large": {"language": LARGE_LANGUAGE_MODEL},
}


__all__ = ["SIZES", "Data", "Metric", "Task", "load_data", "load_fingerprint"]
