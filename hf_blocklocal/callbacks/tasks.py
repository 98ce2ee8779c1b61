"""What transformers calls the task of a model: the class that loads it, and its name on the Hub."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto as auto


# Hub names are left out where one class serves several tasks, or the Hub has no name.
TASKS: tuple[tuple[str, str | None, dict], ...] = (
    (
        "AutoModelForSequenceClassification",
        "text-classification",
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    ("AutoModelForTokenClassification", "token-classification", auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
    ("AutoModelForMaskedLM", "fill-mask", auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    ("AutoModelForCausalLM", "text-generation", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    ("AutoModelForImageClassification", "image-classification", auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
    ("AutoModelForAudioClassification", "audio-classification", auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES),
    (
        "AutoModelForSpeechSeq2Seq",
        "automatic-speech-recognition",
        auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    ),
    ("AutoModelForCTC", "automatic-speech-recognition", auto.MODEL_FOR_CTC_MAPPING_NAMES),
    ("AutoModelForSeq2SeqLM", None, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    ("AutoModelForQuestionAnswering", "question-answering", auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES),
    ("AutoModelForMultipleChoice", "multiple-choice", auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES),
)


def task_of(model: PreTrainedModel) -> tuple[str | None, str | None]:
    """Return the class that loads a model and the task's name on the Hub, each None where it is not known."""
    name = type(model).__name__
    for auto_class, tag, classes in TASKS:
        listed = (one for some in classes.values() for one in ((some,) if isinstance(some, str) else some))
        if name in listed:
            return auto_class, tag
    is_known = type(model).__module__.startswith("transformers.")
    return (name if is_known else None), None
