"""Find the layers of any model by its structure.

Knows what a Hugging Face model looks like inside: where its layers are, what turns them off at random, whether they
come from a checkpoint. It knows nothing of blocks, heads or losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_blocklocal.errors import LayersNotFoundError, SharedLayersError, UnsupportedSettingError


@dataclass(frozen=True)
class Stack:
    """A list of layers that hand a hidden state from one to the next.

    Attributes:
        path: Dotted name of the `nn.ModuleList` in the model, for example `"bert.encoder.layer"`.
        layers: Dotted names of its layers, in the order of the list.
    """

    path: str
    layers: tuple[str, ...]


def find_stacks(model: nn.Module, paths: Sequence[str] | None = None) -> list[Stack]:
    """Find the stacks of layers of a model; encoder-decoders have two.

    A stack is an outermost `nn.ModuleList` whose children all carry the same signal: the model names their class as
    the one whose outputs are the hidden states or as one that must not be split; else they are
    `GradientCheckpointingLayer`s; else they are at least two of one class.

    Args:
        model: The model, wrapped by peft or not.
        paths: Dotted names of the lists, when structure cannot tell.

    Returns:
        The stacks in the order in which the model holds them, not yet confirmed by a forward pass.

    Raises:
        LayersNotFoundError: If nothing looks like a stack, or a given path is none.
    """
    if paths is not None:
        return [_stack_at(model, path) for path in paths]
    named = _named_layer_classes(model)
    signals: tuple[Callable[[nn.ModuleList], bool], ...] = (
        lambda layers: all(type(layer).__name__ in named for layer in layers),
        lambda layers: all(isinstance(layer, GradientCheckpointingLayer) for layer in layers),
        lambda layers: len(layers) > 1 and len({type(layer) for layer in layers}) == 1,
    )
    for signal in signals:
        stacks = list(_outermost_lists(model, signal))
        if stacks:
            return stacks
    seen = sorted({type(child).__name__ for child in model.modules() if isinstance(child, nn.Module)})
    raise LayersNotFoundError(
        f"Found no stack of layers in {type(model).__name__}: no nn.ModuleList holds layers of one kind. "
        f"Classes seen: {', '.join(seen[:40])}. Name the list by hand, for example "
        "BlockLocalConfig(layers=['model.layers'])."
    )


def check_layers_not_shared(model: nn.Module, stacks: Sequence[Stack], num_blocks: int) -> None:
    """Refuse a model that has fewer modules than layers, where that shows without running it.

    Raises:
        SharedLayersError: If the model's config counts more layers than the model has modules for.
    """
    num_layers = sum(len(stack.layers) for stack in stacks)
    declared = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    if num_layers < num_blocks and isinstance(declared, int) and declared > num_layers:
        raise _shared_layers_error(model, f"{num_layers} module(s) for the {declared} layers that its config declares")


def check_layers_run_once(model: nn.Module, calls: dict[str, int]) -> None:
    """Refuse layers that ran several times, or not at all, in a traced forward pass.

    Args:
        model: The traced model, for the message.
        calls: How often each layer of the stacks ran, by dotted name.

    Raises:
        SharedLayersError: If a layer ran more than once.
        LayersNotFoundError: If a layer did not run.
    """
    repeated = {path: count for path, count in calls.items() if count > 1}
    if repeated:
        path, count = next(iter(repeated.items()))
        raise _shared_layers_error(model, f"{path} ran {count} times in one forward pass")
    skipped = [path for path, count in calls.items() if count == 0]
    if skipped:
        raise LayersNotFoundError(
            f"The layers {', '.join(skipped[:4])} of {type(model).__name__} did not run in a traced forward pass. If "
            "they belong to a part that this batch does not use, name the list to cut: BlockLocalConfig(layers=[...])."
        )


def _shared_layers_error(model: nn.Module, evidence: str) -> SharedLayersError:
    return SharedLayersError(
        f"{type(model).__name__} shares layers across depth: {evidence}. A layer that runs in several places belongs "
        "to no single block, so it cannot be trained block-locally. Choose a model with a module per layer."
    )


def _stack_at(model: nn.Module, path: str) -> Stack:
    try:
        layers = model.get_submodule(path)
    except AttributeError:
        layers = None
    if not isinstance(layers, nn.ModuleList | nn.Sequential) or len(layers) == 0:
        lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        given = "nothing" if layers is None else f"a {type(layers).__name__}"
        raise LayersNotFoundError(
            f"layers={path!r} names {given} in {type(model).__name__}, not a list of layers. The lists of this model: "
            f"{', '.join(lists) or 'none'}."
        )
    return Stack(path, tuple(f"{path}.{name}" for name, _ in layers.named_children()))


def _outermost_lists(model: nn.Module, accepts: Callable[[nn.ModuleList], bool]) -> Iterator[Stack]:
    found: list[str] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) > 0 and not inside and accepts(module):
            found.append(path)
            yield _stack_at(model, path)


def _named_layer_classes(model: nn.Module) -> set[str]:
    """Names of the classes that the model itself points out as layers."""
    names: set[str] = set()
    for part in pretrained_parts(model):
        names.update(part._no_split_modules or ())
        for recorder in recorders(part, "hidden_states"):
            names.add(getattr(getattr(recorder, "target_class", recorder), "__name__", str(recorder)))
    return names


def pretrained_parts(model: nn.Module) -> list[PreTrainedModel]:
    """Return the models of transformers that a model is made of, itself among them."""
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def recorders(part: PreTrainedModel, key: str) -> list[object]:
    """Return what a model says it records an output from, such as `"router_logits"`: classes, or who picks them."""
    recorded = (getattr(part, "_can_record_outputs", None) or {}).get(key, [])
    return recorded if isinstance(recorded, list) else [recorded]


def check_all_layers_run(model: nn.Module) -> None:
    """Refuse LayerDrop: a layer that is skipped at random would leave its block without a loss.

    Raises:
        UnsupportedSettingError: If a config or module drops layers with probability above 0.
    """
    for where, holder in [("config", getattr(model, "config", None)), *model.named_modules()]:
        for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
            probability = getattr(holder, name, None)
            if isinstance(probability, float) and probability > 0:
                raise UnsupportedSettingError(
                    f"LayerDrop is on ({where or 'model'}.{name} = {probability}): a skipped layer would leave its "
                    f"block without a loss. Load the model with {name}=0.0."
                )


def is_pretrained(model: nn.Module) -> bool:
    """Tell whether what a model trains has been read from a checkpoint: not adapters, which start anew.

    Its config does not tell, because `from_config` may have been given the one of a checkpoint.
    """
    if getattr(model, "peft_config", None):
        return False
    # What `from_pretrained` leaves: on the model, which a copy keeps, and on the weights that it has read.
    read = any("_weight_conversions" in vars(part) for part in pretrained_parts(model))
    return read or any(getattr(parameter, "_is_hf_initialized", False) for parameter in model.parameters())


def is_encoder_decoder(model: nn.Module) -> bool:
    """Tell whether a model is an encoder with a decoder, which then makes its inputs from labels if none are given."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def shifts_labels(model: nn.Module, loss: Tensor, logits: Tensor, labels: Tensor) -> bool:
    """Tell whether position i predicts label i + 1, as in causal language models without a decoder of its own.

    The model's loss type says so; where a model names none that is known, the loss that it computed does.

    Args:
        model: The model.
        loss: Its loss for a batch.
        logits: Its logits for that batch.
        labels: The labels of the batch.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if is_encoder_decoder(model):
        return False
    loss_type = getattr(model, "loss_type", None)
    if loss_type in LOSS_MAPPING:
        return LOSS_MAPPING[loss_type] is ForCausalLMLoss
    if logits.dim() != 3 or labels.shape != logits.shape[:2] or labels.is_floating_point():
        return False
    in_place = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
    shifted = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    return bool((loss - shifted).abs() < (loss - in_place).abs())
