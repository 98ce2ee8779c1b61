"""Build the same architecture with some of its layers: a config that says so, and the weights that go with it.

Nothing about architectures is known here beyond how configs count layers. What a config cannot say is found out by
building the smaller model and comparing it with the larger one, layer by layer; then it is refused by name.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_blocklocal.cut.blocks import Cut
from hf_blocklocal.errors import TruncationError


# How configs count the layers of one stack, and of an encoder with its decoder.
ONE = ("num_hidden_layers", "num_layers", "decoder_layers", "encoder_layers", "num_decoder_layers")
TWO = (
    ("encoder_layers", "decoder_layers"),
    ("num_layers", "num_decoder_layers"),
    ("num_encoder_layers", "num_decoder_layers"),
)
# Fields that hold a number of lowest layers, and fields that hold indices of layers.
LOWEST = ("max_window_layers", "first_k_dense_replace")
INDICES = ("mlp_only_layers",)
# Lists with an entry for each layer have names with one of these. Others that are as long as the model is deep come
# second, because they may be of something else.
BY_LAYER = ("layer", "types", "pattern", "window", "rope")


@dataclass(frozen=True)
class Kept:
    """The layers of one stack that are kept.

    Attributes:
        path: Dotted name of the list that holds the layers.
        count: Layers of the stack.
        indices: Those that are kept, ascending.
    """

    path: str
    count: int
    indices: tuple[int, ...]


def kept_of(cut: Cut, layers: Sequence[int]) -> tuple[Kept, ...]:
    """Return, stack by stack in the order of execution, which layers are kept.

    Args:
        cut: Where the model is cut.
        layers: Indices of the layers to keep, in the order of execution.
    """
    stacks: dict[int, list[int]] = {}
    for layer, stack in enumerate(cut.stacks):
        stacks.setdefault(stack, []).append(layer)
    return tuple(
        Kept(
            cut.layers[members[0]].rpartition(".")[0],
            len(members),
            tuple(place for place, layer in enumerate(members) if layer in layers),
        )
        for members in stacks.values()
    )


def with_layers(model: PreTrainedModel, kept: Sequence[Kept], *, tied: bool = True) -> PreTrainedModel:
    """Build a model that has some of the layers of another one, with their weights and all that lies outside.

    Args:
        model: The model; left as it is.
        kept: What is kept of each stack.
        tied: Whether weights that the model ties stay tied.

    Raises:
        TruncationError: If the architecture cannot express it.
    """
    if any(not stack.indices for stack in kept):
        raise TruncationError(
            f"Nothing would be left of {next(stack.path for stack in kept if not stack.indices)} in "
            f"{type(model).__name__}, and an encoder-decoder needs layers in both. Keep more blocks, or train with "
            "head_layers=1 or more, so that the head of a block in the encoder has decoder layers."
        )
    reasons = []
    for config in smaller_configs(model.config, kept):
        if not tied:
            config.tie_word_embeddings = False
        config._attn_implementation = model.config._attn_implementation
        small, reason = _built(model, config, kept)
        if small is not None:
            return small
        reasons.append(reason)
    wanted = ", ".join(f"layers {list(stack.indices)} of {stack.path}" for stack in kept)
    raise TruncationError(
        f"{type(model).__name__} with {wanted} is no model that its config can describe: "
        f"{reasons[0] if reasons else f'no field of {type(model.config).__name__} counts these layers'}."
    )


def smaller_configs(config: PreTrainedConfig, kept: Sequence[Kept]) -> Iterator[PreTrainedConfig]:
    """Make configs that may describe a model with fewer layers, the most likely one first, each as JSON gives it back.

    Args:
        config: Of the whole model.
        kept: What is kept of each stack.
    """
    for path in _holders(config):
        holder = _at(config, path)
        for names in _counts(holder, kept):
            for lists in (BY_LAYER, ("",)):
                smaller = copy.deepcopy(config)
                try:
                    for name, stack in zip(names, kept, strict=True):
                        _keep_(_at(smaller, path), name, stack, lists if len(kept) == 1 else ())
                    yield type(config).from_dict(json.loads(smaller.to_json_string(use_diff=False)))
                except (ValueError, TypeError, NotImplementedError):  # a config that checks itself says no
                    continue


def _holders(config: PreTrainedConfig) -> list[str]:
    """Return where in a config layers may be counted: in itself, or in a part of it."""
    return ["", *(name for name, value in vars(config).items() if isinstance(value, PreTrainedConfig))]


def _at(config: PreTrainedConfig, path: str) -> PreTrainedConfig:
    return getattr(config, path) if path else config


def _counts(holder: PreTrainedConfig, kept: Sequence[Kept]) -> list[tuple[str, ...]]:
    candidates = [(name,) for name in ONE] if len(kept) == 1 else list(TWO) if len(kept) == 2 else []
    return [
        names
        for names in candidates
        if all(getattr(holder, name, None) == stack.count for name, stack in zip(names, kept, strict=True))
    ]


def _keep_(config: PreTrainedConfig, name: str, kept: Kept, lists: Sequence[str]) -> None:
    """Let a config count the layers that are kept, and list them where the name of a list holds one of these parts."""
    setattr(config, name, len(kept.indices))
    for field, value in list(vars(config).items()):
        if field in LOWEST and isinstance(value, int):
            setattr(config, field, sum(index < value for index in kept.indices))
        elif field in INDICES and isinstance(value, list):
            setattr(config, field, [place for place, index in enumerate(kept.indices) if index in value])
        elif isinstance(value, list | tuple) and len(value) == kept.count and any(part in field for part in lists):
            setattr(config, field, [value[index] for index in kept.indices])
    layers = getattr(config, "attention_layers", None)
    if isinstance(layers, list) and getattr(config, "attention_types", None):  # two ways to say it, one kept on disk
        config.attention_types = [[layers, 1]]


def _built(
    model: PreTrainedModel, config: PreTrainedConfig, kept: Sequence[Kept]
) -> tuple[PreTrainedModel | None, str]:
    """Build the smaller model; or say why it is none."""
    with torch.random.fork_rng(devices=[]):
        try:
            small = type(model)(config)
        except (ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
            return None, f"building it fails ({error})"
    if misfit := _misfit(model, small, kept):
        return None, misfit
    weights = model.state_dict()
    tensors = {}
    for name, tensor in small.state_dict().items():
        source = next((old for old in _sources(name, kept) if old in weights), None)
        if source is None or weights[source].shape != tensor.shape:
            found = "nowhere" if source is None else f"with shape {tuple(weights[source].shape)}"
            return None, f"{name}, of shape {tuple(tensor.shape)}, is {found} in the whole model"
        tensors[name] = weights[source].detach().clone()
    if unused := _outside(weights, kept) - tensors.keys():
        return None, f"{sorted(unused)[0]} has no place in it"
    small.load_state_dict(tensors, assign=True)
    small.tie_weights()
    small.to(model.device).eval()
    if model.can_generate():
        small.generation_config = copy.deepcopy(model.generation_config)
    return small, ""


def _sources(name: str, kept: Sequence[Kept]) -> list[str]:
    """Return the names that a tensor of the smaller model may have in the larger one, the best first.

    What only the first layer of a stack has, such as the biases of relative positions, stays with the first layer.
    """
    for stack in kept:
        if name.startswith(f"{stack.path}."):
            place, _, rest = name.removeprefix(f"{stack.path}.").partition(".")
            old = f"{stack.path}.{stack.indices[int(place)]}.{rest}"
            return [old, f"{stack.path}.0.{rest}"] if place == "0" else [old]
    return [name]


def _outside(weights: Mapping[str, Tensor], kept: Sequence[Kept]) -> set[str]:
    return {name for name in weights if not any(name.startswith(f"{stack.path}.") for stack in kept)}


def _misfit(model: nn.Module, small: nn.Module, kept: Sequence[Kept]) -> str | None:
    """Say where a layer of the smaller model is another one than that of the larger; None if all are the same."""
    for stack in kept:
        new, old = (dict(part.get_submodule(stack.path).named_children()) for part in (small, model))
        if len(new) != len(stack.indices):
            return f"it would have {len(new)} layers in {stack.path} instead of {len(stack.indices)}"
        for place, index in enumerate(stack.indices):
            allowed = [(index, old[str(index)])] + ([(0, old["0"])] if place == 0 else [])
            for path, module in new[str(place)].named_modules():
                if difference := _difference(path, module, place, allowed):
                    return f"{stack.path}.{place} would differ from layer {index} of the whole model in {difference}"
    return None


def _difference(path: str, module: nn.Module, place: int, allowed: Sequence[tuple[int, nn.Module]]) -> str | None:
    """Name the first setting of a module that it has from none of the layers allowed; indices move with the layer."""
    originals = []
    for index, layer in allowed:
        twin = dict(layer.named_modules()).get(path)
        if twin is not None:
            originals.append((index, twin))
    if not any(type(twin) is type(module) for _, twin in originals):
        return f"the kind of {path or 'the layer'}"
    settings = [(index, _settings(twin)) for index, twin in originals]
    for name, value in _settings(module).items():
        if any(found.get(name) == value for _, found in settings):
            continue
        moved = isinstance(value, int) and not isinstance(value, bool) and value == place
        if not (moved and any(found.get(name) == index for index, found in settings)):
            return f"{path}.{name}" if path else name
    return None


def _settings(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str) and name != "training" and not name.startswith("_")
    }
