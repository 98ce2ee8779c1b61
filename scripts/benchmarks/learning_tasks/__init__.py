"""The tasks of the learning benchmark. To add one: a subclass of `Task` in a file of its own, and a line below."""

from __future__ import annotations

from learning_tasks.base import Data, Metric, Task, load_data, load_fingerprint
from learning_tasks.language_model import LanguageModel
from learning_tasks.reversal import Reversal
from learning_tasks.text_classification import TextClassification


SMALL: dict[str, Task] = {task.name: task for task in (TextClassification(), LanguageModel(), Reversal())}


__all__ = ["SMALL", "Data", "Metric", "Task", "load_data", "load_fingerprint"]
