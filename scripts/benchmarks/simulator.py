"""Play out in virtual time what ranks do: operations in the order of each rank, and messages over links.

An operation starts when its rank is free and all that it needs is there. A message occupies its link for its size over
the bandwidth, arrives a latency later, and does not occupy a rank. Nothing here knows blocks or schedules.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field


Key = Hashable


@dataclass(frozen=True)
class Need:
    """Something that an operation waits for.

    Attributes:
        key: The operation that makes it.
        sender: Rank that sends it, if it comes over a link; None where only the end of the other operation counts.
    """

    key: Key
    sender: int | None = None


@dataclass(frozen=True)
class Op:
    """What a rank does for a while.

    Attributes:
        key: Its name.
        seconds: How long it takes.
        needs: What it waits for.
    """

    key: Key
    seconds: float
    needs: tuple[Need, ...] = ()


@dataclass(frozen=True)
class Network:
    """The links between ranks, all alike.

    Attributes:
        transfer: Seconds that a message occupies its link: bytes over bandwidth.
        latency: Seconds from then until it has arrived.
    """

    transfer: float = 0.0
    latency: float = 0.0


@dataclass
class Outcome:
    """When everything has happened.

    Attributes:
        ends: When each operation was done.
        busy: Seconds that each rank has worked.
    """

    ends: dict[Key, float] = field(default_factory=dict)
    busy: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """When the last operation was done."""
        return max(self.ends.values())


def play(ranks: Sequence[Sequence[Op]], network: Network | None = None) -> Outcome:
    """Play all operations out.

    Args:
        ranks: What each rank does, in its order.
        network: The links.

    Raises:
        ValueError: If ranks wait for each other in a circle, or for something that nobody does.
    """
    network = network or Network()
    outcome = Outcome(busy=[sum(op.seconds for op in ops) for ops in ranks])
    following, free = [0] * len(ranks), [0.0] * len(ranks)
    waiting: dict[Key, list[int]] = {}
    links: dict[tuple[int, int], float] = {}
    arrived: dict[tuple[Key, int], float] = {}
    active = list(range(len(ranks)))
    while active:
        rank = active.pop()
        ops = ranks[rank]
        while following[rank] < len(ops):
            op = ops[following[rank]]
            missing = next((need.key for need in op.needs if need.key not in outcome.ends), None)
            if missing is not None:
                waiting.setdefault(missing, []).append(rank)
                break
            start = max([free[rank], *(_there(need, rank, outcome, network, links, arrived) for need in op.needs)])
            free[rank] = outcome.ends[op.key] = start + op.seconds
            following[rank] += 1
            active += waiting.pop(op.key, ())
    stuck = {rank: ops[done].key for rank, (done, ops) in enumerate(zip(following, ranks, strict=True)) if ops[done:]}
    if stuck:
        raise ValueError(f"Ranks wait for ever: {stuck}. An order is wrong, or something is missing.")
    return outcome


def _there(
    need: Need,
    rank: int,
    outcome: Outcome,
    network: Network,
    links: dict[tuple[int, int], float],
    arrived: dict[tuple[Key, int], float],
) -> float:
    """Return when something is there. Messages of a link are asked for in the order in which they were sent."""
    end = outcome.ends[need.key]
    if need.sender is None or need.sender == rank:
        return end
    if (need.key, rank) not in arrived:
        link = (need.sender, rank)
        links[link] = max(links.get(link, 0.0), end) + network.transfer
        arrived[need.key, rank] = links[link] + network.latency
    return arrived[need.key, rank]
