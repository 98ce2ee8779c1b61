"""Write a head of a block's own as the architecture's task head, where that has the same form.

A linear readout is a layer norm and one linear map, and so are the logits that it makes with messages of classes that
are Gaussian. Where an architecture ends in a layer norm, perhaps a choice of one position, and one linear map, the two
can say the same. Whether they do is not argued but measured, by whoever calls.
"""

# Shapes: C classes, D hidden width, Z units of the latent.

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_blocklocal.anatomy.modes import evaluation_mode
from hf_blocklocal.anatomy.signals import first_tensor, map_tensors
from hf_blocklocal.cut.blocks import Cut
from hf_blocklocal.cut.trace import reached_parameters
from hf_blocklocal.feedback import FeedbackHead, LinearReadout, MLPReadout
from hf_blocklocal.losses import Agreement, Contrast
from hf_blocklocal.targets.batch import Targets


def parameters_behind_layers(model: nn.Module, last_layer: str, inputs: Mapping[str, Any]) -> dict[str, nn.Parameter]:
    """Return the parameters that a model uses behind its last layer, by name: its norm and its task head.

    Args:
        model: The model.
        last_layer: Dotted name of its last layer.
        inputs: A small batch with labels.
    """

    def detached(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        hidden = first_tensor(output)
        return map_tensors(output, lambda tensor: tensor.detach().requires_grad_(tensor is hidden))

    handle = model.get_submodule(last_layer).register_forward_hook(detached)
    try:
        with evaluation_mode(model), torch.enable_grad():
            reached = reached_parameters(model(**inputs).loss)
    finally:
        handle.remove()
    return {name: parameter for name, parameter in model.named_parameters() if parameter in reached}


@torch.no_grad()
def express_(model: PreTrainedModel, head: FeedbackHead, targets: Targets, behind: Mapping[str, nn.Parameter]) -> bool:
    """Write a head into the norm and the linear map behind the last layer of a model, where there are just these.

    Args:
        model: The model, changed in place if at all.
        head: A head of a block's own, at the end of its last layer.
        targets: Targets of any batch.
        behind: The parameters that the model uses behind its last layer.

    Returns:
        Whether it was written. What the model then predicts is to be compared.
    """
    linear_form = _linear_form(head, targets)
    norms, maps = (_modules_of(model, kind, behind) for kind in (nn.LayerNorm, nn.Linear))
    held = {id(parameter) for module in (*norms, *maps) for parameter in module.parameters()}
    if linear_form is None or (len(norms), len(maps)) != (1, 1) or held != {id(p) for p in behind.values()}:
        return False
    (norm,), (linear,) = norms, maps
    weight_CD, bias_C = linear_form
    if linear.weight.shape != weight_CD.shape or norm.weight.shape != head.readout.norm.weight.shape:
        return False
    if linear.weight is input_embedding(model):
        return False
    shift_D = head.readout.norm.bias
    if linear.bias is None:  # then the norm's shift has to say it
        shift_D = shift_D + torch.linalg.pinv(weight_CD) @ bias_C
    else:
        linear.bias.copy_(bias_C)
    linear.weight.copy_(weight_CD)
    norm.weight.copy_(head.readout.norm.weight)
    norm.bias.copy_(shift_D)
    return True


def _linear_form(head: FeedbackHead, targets: Targets) -> tuple[Tensor, Tensor] | None:
    """Return the weight (C, D) and the bias (C,) that make the head's logits of its normalised rows, if they do."""
    readout = head.readout
    if not isinstance(readout, LinearReadout) or isinstance(readout, MLPReadout) or head.lens is not None:
        return None
    weight_ZD, bias_Z = readout.linear.weight, readout.linear.bias
    if isinstance(head.loss, Agreement):
        return weight_ZD, bias_Z
    if isinstance(head.loss, Contrast) and head.loss.family.name == "gaussian":
        messages_CZ = head.feedback(targets)
        return messages_CZ @ weight_ZD / 2, messages_CZ @ bias_Z / 2 - messages_CZ.square().sum(-1) / 4
    return None


def _modules_of(model: nn.Module, kind: type[nn.Module], behind: Mapping[str, nn.Parameter]) -> list[nn.Module]:
    found = {id(parameter) for parameter in behind.values()}
    return [
        module
        for module in model.modules()
        if isinstance(module, kind) and module.weight is not None and id(module.weight) in found
    ]


def input_embedding(model: PreTrainedModel) -> Tensor | None:
    """Return the matrix that a model may tie its task head to: that of its input tokens, None if it has none."""
    try:
        return getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:
        return None


def last_layer_of(cut: Cut, layers: int) -> str:
    """Return the dotted name that the last layer has in a model that keeps so many layers of its last stack."""
    return f"{cut.layers[-1].rpartition('.')[0]}.{layers - 1}"
