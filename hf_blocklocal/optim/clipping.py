"""Clip the gradients of one block at a time, and see that they are finite.

Whatever couples parameters, such as a gradient norm, is taken per block: then a block is trained the same whether the
other blocks live in this process or in another one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from hf_blocklocal.errors import NonFiniteLossError


def clip_block_(
    parameters: Sequence[nn.Parameter],
    max_norm: float,
    *,
    parts: Collection[nn.Parameter] = (),
    add_up: Callable[[Tensor], Tensor] | None = None,
) -> Tensor | None:
    """Scale the gradients of one block down to a norm, in place.

    Args:
        parameters: The parameters of the block; those without gradient do not count.
        max_norm: Largest norm to leave; infinity only measures.
        parts: Those of them of which other processes have the rest.
        add_up: Returns the sum of a tensor over those processes.

    Returns:
        The norm before clipping, None if no parameter has a gradient.
    """
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    if not with_gradient:
        return None
    if not parts:
        return torch.nn.utils.clip_grad_norm_(with_gradient, max_norm)
    spread = [parameter.grad for parameter in with_gradient if parameter in parts]
    whole = [parameter.grad for parameter in with_gradient if parameter not in parts]
    squares = add_up(get_total_norm(spread).square()) if spread else 0.0
    norm = (squares + get_total_norm(whole).square()).sqrt() if whole else squares.sqrt()
    clip_grads_with_norm_(with_gradient, max_norm, norm)
    return norm


def check_norms(norms: Mapping[int, Tensor], step: int) -> None:
    """Stop before a gradient that is not finite, of this process or averaged in from another, reaches a weight.

    Args:
        norms: Norm of the gradient of each block.
        step: Optimizer step under way, for the message.

    Raises:
        NonFiniteLossError: If a norm is NaN or infinite.
    """
    if not norms:
        return
    device = next(iter(norms.values())).device
    finite = torch.stack([norm.float().to(device) for norm in norms.values()]).isfinite().tolist()
    for block, is_finite in zip(norms, finite, strict=True):
        if not is_finite:
            raise NonFiniteLossError(
                f"The gradient of block {block} is not finite at step {step}. Its weights have not been touched. "
                "Lower the learning rate, look at the data of this batch, and resume from the last checkpoint."
            )


def total_norm(norms: Sequence[Tensor | None]) -> Tensor:
    """Return the norm of all blocks' gradients together."""
    known = [norm.float() for norm in norms if norm is not None]
    if not known:
        return torch.tensor(0.0)
    if len(known) == 1:
        return known[0]
    return torch.stack([norm.to(known[0].device) for norm in known]).square().sum().sqrt()
