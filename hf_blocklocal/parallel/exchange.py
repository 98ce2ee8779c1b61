"""Weights on their way down a chain of blocks, from the processes that own them to those whose heads borrow them.

Each pair of a lender and a borrower has a stream of its own, and both know at which steps something sets out. So
nothing has to be asked for, and the only one who may have to wait is a borrower that is further ahead than the lag.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_blocklocal.parallel.chain import Chain


class WeightExchange:
    """Lends weights of one block and borrows those of others; see `borrowing.copies.Exchange`.

    All processes must make it together.

    Args:
        chain: The place of this process.
        weights: Parameters and running statistics of the model by name.
        lent: For each block but the last, the names of those that its head borrows.
        owners: The block that owns each of them.
        most_under_way: How often weights may have set out that are not yet in use.
    """

    def __init__(
        self,
        chain: Chain,
        weights: Mapping[str, Tensor],
        lent: Sequence[set[str]],
        owners: Mapping[str, int],
        *,
        most_under_way: int,
    ) -> None:
        self._chain = chain
        self._weights = weights
        ways = {
            (owner, borrower): names
            for borrower, wanted in enumerate(lent)
            for owner in range(borrower + 1, chain.num_blocks)
            if (names := sorted(name for name in wanted if owners[name] == owner))
        }
        outboxes, inboxes = chain.connect(list(ways), depth=most_under_way)
        self._lending = [(outbox, ways[chain.block, block]) for block, outbox in outboxes.items()]
        self._borrowing = [(inbox, ways[block, chain.block]) for block, inbox in inboxes.items()]

    @torch.no_grad()
    def give(self, used_at: int) -> None:
        """Send weights of this process, as they are now, to where they come into use at a step."""
        taken: dict[str, Tensor] = {}
        for outbox, names in self._lending:
            taken |= {name: self._as_it_is(name) for name in names if name not in taken}
            outbox.send({"used_at": used_at}, [taken[name] for name in names])

    def _as_it_is(self, name: str) -> Tensor:
        """Return a copy of a weight, whole."""
        weight = self._weights[name].detach()
        return self._chain.together(weight.full_tensor) if isinstance(weight, DTensor) else weight.clone()

    def take(self, used_at: int) -> dict[str, Tensor]:
        """Return the weights that come into use here at a step, waiting for them if need be."""
        weights: dict[str, Tensor] = {}
        for inbox, names in self._borrowing:
            message = inbox.take()
            assert message.facts["used_at"] == used_at, "both sides know when something sets out"
            weights |= dict(zip(names, message.value, strict=True))
        return weights
