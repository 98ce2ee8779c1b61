"""The tasks of scripts/train.py. To add one: a subclass of `Kit` in a file of its own, a line below, a YAML file."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from tasks.base import Kit, Prepared
from tasks.chat import Chat
from tasks.images import ImageClassification
from tasks.language import CausalLanguageModel, MaskedLanguageModel
from tasks.questions import QuestionAnswering
from tasks.sequences import SequenceToSequence
from tasks.sounds import AudioClassification
from tasks.texts import TextClassification
from tasks.tokens import TokenClassification


KITS: dict[str, type[Kit]] = {
    "text-classification": TextClassification,
    "token-classification": TokenClassification,
    "question-answering": QuestionAnswering,
    "masked-language-modelling": MaskedLanguageModel,
    "causal-language-modelling": CausalLanguageModel,
    "chat": Chat,
    "sequence-to-sequence": SequenceToSequence,
    "image-classification": ImageClassification,
    "audio-classification": AudioClassification,
}


def kit_of(task: str, options: dict[str, Any]) -> Kit:
    """Return the kit of a task with the options of a YAML file.

    Raises:
        ValueError: If there is no such task, or it has no such option.
    """
    if task not in KITS:
        raise ValueError(f"task: {task!r} is not known. Choose one of {sorted(KITS)}.")
    known = sorted(option.name for option in fields(KITS[task]))
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"The task {task!r} has no options {unknown}. It has {known or 'none'}.")
    return KITS[task](**options)


__all__ = ["KITS", "Kit", "Prepared", "kit_of"]
