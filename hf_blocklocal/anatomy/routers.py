"""Find the routers of a mixture of experts, and the load-balancing loss that the model makes of what they return."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from hf_blocklocal.anatomy.layers import pretrained_parts, recorders
from hf_blocklocal.errors import UnsupportedSettingError


@dataclass(frozen=True)
class RouterLoss:
    """The load-balancing loss of a mixture of experts, and where its inputs come from.

    Attributes:
        routers: Dotted name of each router and the index of its logits in the router's output.
        coefficient: Weight of the loss in the model's own total.
        balance: `(router logits of some layers, attention mask) -> loss`.
    """

    routers: dict[str, int]
    coefficient: float
    balance: Callable[[tuple[Tensor, ...], Tensor | None], Tensor]


def find_router_loss(model: nn.Module) -> RouterLoss | None:
    """Return the router loss that the model adds in training, None if it adds none."""
    routers = _find_routers(model)  # by their names in the wrapped model
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(model, "config", None)
    if not getattr(config, "output_router_logits", False):
        return None
    balance = getattr(inspect.getmodule(type(model)), "load_balancing_loss_func", None)
    if balance is None or not routers:
        raise UnsupportedSettingError(
            f"{type(model).__name__} has output_router_logits=True, but its router loss could not be taken apart by "
            "block. Set model.config.output_router_logits = False to train without it."
        )
    experts, top_k = model.num_experts, model.num_experts_per_tok
    return RouterLoss(routers, model.router_aux_loss_coef, lambda logits, mask: balance(logits, experts, top_k, mask))


def _find_routers(model: nn.Module) -> dict[str, int]:
    routers: dict[str, int] = {}
    for part in pretrained_parts(model):
        for recorder in recorders(part, "router_logits"):
            target = getattr(recorder, "target_class", recorder)
            if isinstance(target, type):
                index = getattr(recorder, "index", 1)
                routers |= {path: index for path, module in model.named_modules() if isinstance(module, target)}
    return routers
