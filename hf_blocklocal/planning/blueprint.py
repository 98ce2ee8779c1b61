"""A model and a batch without memory, built from a configuration alone: of fake tensors, which have no values.

Operations on fake tensors are those that a CPU would run, so what autograd would save can be counted.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
from transformers.models.auto import modeling_auto

from hf_blocklocal.cut.trace import LossTraits
from hf_blocklocal.errors import BlockLocalError, UnsupportedSettingError


# The class that picks a model for a task, and transformers' list of the models that it picks from.
TASKS = {
    "causal-lm": ("AutoModelForCausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "masked-lm": ("AutoModelForMaskedLM", modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "seq2seq-lm": ("AutoModelForSeq2SeqLM", modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    "speech-seq2seq": ("AutoModelForSpeechSeq2Seq", modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES),
    "sequence-classification": (
        "AutoModelForSequenceClassification",
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    "token-classification": (
        "AutoModelForTokenClassification",
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    ),
    "question-answering": (
        "AutoModelForQuestionAnswering",
        modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    ),
    "image-classification": (
        "AutoModelForImageClassification",
        modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    ),
    "audio-classification": (
        "AutoModelForAudioClassification",
        modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
    ),
}
_PER_POSITION = ("causal-lm", "masked-lm", "seq2seq-lm", "speech-seq2seq", "token-classification")
# Samples of a sound, for each token of the text that it is written down as: about three tokens a second, at 16 kHz.
_SAMPLES_PER_TOKEN = 5000


@dataclass(frozen=True)
class Shape:
    """The size of a batch.

    Attributes:
        batch: Samples.
        sequence: Tokens of a text, or samples of a sound. Images have the size that the configuration says, and so has
            a spectrogram that is written down as a text.
    """

    batch: int = 8
    sequence: int = 512


def task_of(config: PretrainedConfig) -> str:
    """Return the task of the model class that a configuration names.

    Raises:
        UnsupportedSettingError: If it names none that is known.
    """
    for name in config.architectures or ():
        for task, (_, models) in TASKS.items():
            if any(name in (names if isinstance(names, tuple) else (names,)) for names in models.values()):
                return task
    raise UnsupportedSettingError(
        f"The configuration of {config.model_type!r} names the classes {config.architectures}, which tell no task. "
        f"Choose one of {sorted(TASKS)}."
    )


@contextmanager
def without_memory() -> Iterator[None]:
    """Make the tensors that are made inside the `with` fakes, which know their shape and type and hold nothing.

    Raises:
        UnsupportedSettingError: If something inside needs values, or fails for want of them.
    """
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _ExpertsOfAnyType():
            yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UnsupportedSettingError(
            f"This model asks for values on its way ({error}), which fake tensors do not have. Measure it with "
            "weights: --with-weights, if need be with fewer layers."
        ) from error
    except RuntimeError as error:
        if isinstance(error, BlockLocalError):
            raise
        said = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise UnsupportedSettingError(
            f"This model does not run on fake tensors ({said}). Measure it with weights: --with-weights, if need be "
            "with fewer layers."
        ) from error


class _ExpertsOfAnyType(TorchDispatchMode):
    """Lets fake tensors of any type go through experts, as on a CPU.

    Until torch's own fakes of these products, which ask for bfloat16 as some GPUs do, know the CPU's.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not torch.ops.aten._grouped_mm.default:
            return func(*args, **(kwargs or {}))
        first, second, ends = args[:3]
        if first.dim() == second.dim():  # a product for each group; of matrices, the groups share out the inner side
            return first.new_empty(len(ends) if ends is not None else len(first), first.shape[-2], second.shape[-1])
        return first.new_empty(first.shape[-2], second.shape[-1])


def build_model(
    config: PretrainedConfig, task: str, *, dtype: torch.dtype = torch.float32, with_weights: bool = False
) -> nn.Module:
    """Build a model without weights; to be called, and the model to be used, inside `without_memory`.

    Args:
        config: Its configuration.
        task: A key of `TASKS`.
        dtype: Type of its weights.
        with_weights: Whether it has weights after all, drawn at random.

    Raises:
        UnsupportedSettingError: If there is no such task.
    """
    if task not in TASKS:
        raise UnsupportedSettingError(f"There is no task {task!r}. Choose one of {sorted(TASKS)}.")
    auto_class = getattr(transformers, TASKS[task][0])
    if task == "sequence-classification" and config.problem_type is None and config.num_labels > 1:
        config = copy.deepcopy(config)
        config.problem_type = "single_label_classification"  # else models look at labels to find out
    if with_weights:
        return auto_class.from_config(config, dtype=dtype)
    # No weight is drawn, and what a model computes of its configuration while it is made has values.
    with unset_fake_temporarily(), torch.device("meta"):
        model = auto_class.from_config(config, dtype=dtype)
    fakes: dict[Tensor, Tensor] = {}  # tied weights stay tied
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or tensor.device.type != "meta":
                    continue
                if tensor not in fakes:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    is_weight = isinstance(tensor, nn.Parameter)
                    fakes[tensor] = nn.Parameter(fake, tensor.requires_grad) if is_weight else fake
                tensors[name] = fakes[tensor]
    return model


def build_inputs(config: PretrainedConfig, task: str, shape: Shape) -> dict[str, Tensor]:
    """Make a batch of full length: no padding, every label counts. Its values mean nothing.

    Args:
        config: Configuration of the model.
        task: A key of `TASKS`.
        shape: Size of the batch.
    """
    tokens_BS = torch.ones(shape.batch, shape.sequence, dtype=torch.long)
    inputs = {"input_ids": tokens_BS}
    if task == "image-classification":
        side = config.image_size
        height, width = (side, side) if isinstance(side, int) else side
        inputs = {"pixel_values": torch.zeros(shape.batch, config.num_channels, height, width)}
    if task == "audio-classification":
        inputs = {"input_values": torch.zeros(shape.batch, shape.sequence)}
    if task == "speech-seq2seq":
        inputs = _sound(config, shape)
    if task == "question-answering":
        return inputs | dict.fromkeys(("start_positions", "end_positions"), torch.zeros_like(tokens_BS[:, 0]))
    return inputs | {"labels": tokens_BS.clone() if task in _PER_POSITION else torch.zeros_like(tokens_BS[:, 0])}


def _sound(config: PretrainedConfig, shape: Shape) -> dict[str, Tensor]:
    """Make the sound of a batch of texts as a model takes it: bands by frames, frames by bands, or samples."""
    if hasattr(config, "num_mel_bins"):  # a convolution halves the frames
        return {"input_features": torch.zeros(shape.batch, config.num_mel_bins, 2 * config.max_source_positions)}
    if hasattr(config, "input_feat_per_channel"):
        frames = torch.zeros(shape.batch, config.max_source_positions, config.input_feat_per_channel)
        return {"input_features": frames}
    return {"input_values": torch.zeros(shape.batch, shape.sequence * _SAMPLES_PER_TOKEN)}


def loss_traits(task: str) -> LossTraits:
    """Return what the loss of a task is known to do."""
    return LossTraits(shifts_labels=task == "causal-lm")


def read_config(source: str, overrides: Mapping[str, Any]) -> PretrainedConfig:
    """Read the configuration of a model: a folder, a `config.json`, or a type such as `llama` with its defaults.

    Args:
        source: Which.
        overrides: Fields to set.

    Raises:
        UnsupportedSettingError: If a field is unknown, or the source is none of the three.
    """
    path = Path(source)
    if path.exists():
        values = json.loads((path / "config.json" if path.is_dir() else path).read_text(encoding="utf-8"))
    elif source in CONFIG_MAPPING:
        values = {"model_type": source}
    else:
        raise UnsupportedSettingError(
            f"{source!r} is no folder with a config.json, no such file, and no type of model that transformers knows."
        )
    model_type = values.pop("model_type")
    known = AutoConfig.for_model(model_type).to_dict()
    unknown = sorted(set(overrides) - set(known) - {"num_labels"})
    if unknown:
        raise UnsupportedSettingError(
            f"Configurations of {model_type!r} have no {unknown}. Known are {sorted(known)}."
        )
    return AutoConfig.for_model(model_type, **(values | dict(overrides)))
