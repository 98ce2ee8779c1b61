"""Which process holds which block, and the ways between them.

Processes form chains of one process per block, and chains are copies of each other: a mesh of data parallelism by
blocks. A chain is consecutive ranks, so that its messages stay within a machine where they can.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from hf_blocklocal.errors import BlockLocalError, BlockPeerError, UnsupportedSettingError
from hf_blocklocal.parallel.clocks import ahead_by, ask_time, tell_time
from hf_blocklocal.parallel.machines import check_reachable, machines_of_all, names_of
from hf_blocklocal.parallel.meetings import Meetings
from hf_blocklocal.parallel.peers import Peers
from hf_blocklocal.parallel.queues import check_queues
from hf_blocklocal.parallel.stream import DEPTH, Inbox, Link, Outbox


_ON_CPUS = (
    " With --cpu, accelerate starts a single process, however many are asked for: on CPUs set ACCELERATE_USE_CPU=true "
    "and give it a configuration of GPUs (--config_file, with distributed_type: MULTI_GPU)."
)
# Between two runs nobody sends for as long as a user likes; who is lost is found out otherwise.
_PATIENCE = timedelta(days=7)
# Numbers that NCCL sends as it sends large tensors.
_LARGE = 1 << 20
# Trainers are made in the same order in all processes, so a number tells what one has said from what another has.
_NUMBERS = count()

Result = TypeVar("Result")


@dataclass
class Chain:
    """The place of this process among all.

    Attributes:
        block: The block it holds.
        num_blocks: Blocks, K.
        replica: Which of the chains it belongs to.
        num_replicas: Chains, D.
        replicas: Group of the processes that hold this block.
        blocks: Group of the processes of this chain.
        control: Group of all processes, for tensors on the CPU.
        control_of_blocks: The same, of this chain.
        control_of_replicas: The same, of the processes that hold this block.
        peers: The other processes.
        device: Where this process computes.
        inbox: Where messages of the block below arrive; none at the first.
        outbox: Where messages to the block above are put; none at the last.
        in_session: Whether streams are open.
    """

    block: int
    num_blocks: int
    replica: int
    num_replicas: int
    replicas: dist.ProcessGroup
    blocks: dist.ProcessGroup
    control: dist.ProcessGroup
    control_of_blocks: dist.ProcessGroup
    control_of_replicas: dist.ProcessGroup
    peers: Peers
    device: torch.device
    inbox: Inbox | None = None
    outbox: Outbox | None = None
    in_session: bool = False
    _outboxes: list[Outbox] = field(default_factory=list, repr=False)
    _inboxes: list[Inbox] = field(default_factory=list, repr=False)
    _meetings: Meetings | None = field(default=None, repr=False)
    _failed: bool = field(default=False, repr=False)

    @property
    def name(self) -> str:
        """What this process is called in messages."""
        name = self.peers.names[self.first_rank + self.block]
        return f"{name[0].lower()}{name[1:]}"

    @property
    def first_rank(self) -> int:
        """Rank of the process that holds this chain's first block."""
        return self.replica * self.num_blocks

    @property
    def last_rank(self) -> int:
        """Rank of the process that holds this chain's last block."""
        return self.first_rank + self.num_blocks - 1

    @property
    def is_last(self) -> bool:
        """Whether this process holds the last block."""
        return self.block == self.num_blocks - 1

    @property
    def writes(self) -> bool:
        """Whether this process writes checkpoints."""
        return self.block == self.replica == 0

    @property
    def idle_seconds(self) -> float:
        """Seconds that this process has waited for a neighbour so far."""
        return sum(box.waited for box in (self.inbox, self.outbox) if box is not None)

    def waits(self) -> list[tuple[float, float]]:
        """Return beginning and end of the last times that this process has waited for another, by its clock."""
        return [wait for box in self._boxes for wait in box.waits]

    def connect(
        self, ways: Sequence[tuple[int, int]], *, depth: int = DEPTH
    ) -> tuple[dict[int, Outbox], dict[int, Inbox]]:
        """Make one-way streams between blocks, the same ones in every chain. All processes must call it together.

        Args:
            ways: The block that sends, and the one that receives.
            depth: Messages that may wait on either side.

        Returns:
            The streams that begin in this process, by the block that they lead to, and those that end in it, by the
            block that they come from.
        """
        outboxes: dict[int, Outbox] = {}
        inboxes: dict[int, Inbox] = {}
        for first in range(0, self.num_replicas * self.num_blocks, self.num_blocks):
            for sender, receiver in ways:
                headers = dist.new_group([first + sender, first + receiver], timeout=_PATIENCE, backend="gloo")
                payload = headers
                if dist.get_backend() != "gloo":
                    payload = dist.new_group([first + sender, first + receiver], timeout=_PATIENCE)
                if first == self.first_rank and self.block == sender:
                    rank = first + receiver
                    link = Link(rank, headers, payload, self.device)
                    outboxes[receiver] = Outbox(link, partial(self._watch, rank), depth)
                    self.together(link.greet)
                elif first == self.first_rank and self.block == receiver:
                    rank = first + sender
                    link = Link(rank, headers, payload, self.device)
                    inboxes[sender] = Inbox(link, partial(self._watch, rank), depth)
                    self.together(link.be_greeted)
        self._outboxes += outboxes.values()
        self._inboxes += inboxes.values()
        return outboxes, inboxes

    def _watch(self, peer: int, broken: BaseException | None = None) -> None:
        """Raise if waiting for a process is in vain, or if any other stream of this one has broken in the meantime."""
        for box in self._boxes:
            if box.error is not None:
                self.peers.check(box.link.peer, box.error)
        self.peers.check(peer, broken)

    @property
    def _boxes(self) -> list[Outbox | Inbox]:
        return [*self._outboxes, *self._inboxes]

    def together(self, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Run a function that waits for other processes, and return what it returns.

        Raises:
            BlockPeerError: If waiting is in vain.
        """
        if self._meetings is None:
            self._meetings = Meetings(self.peers.check_all, self.explain, self.device)
        try:
            return self._meetings.run(function, *args, **kwargs)
        except BlockPeerError as error:
            self.fail(error)
            raise

    def meet(self) -> None:
        """Wait until all processes are here, so that what they do next cannot wait for one that is gone."""
        self.together(dist.barrier, group=self.control)

    def first_is_ahead_by(self) -> float:
        """Return by how many seconds the first clock of this chain is ahead of the one here; all of it must call."""
        if self.block > 0:
            return ahead_by(self.together(ask_time, self.first_rank, self.control_of_blocks))
        for rank in range(self.first_rank + 1, self.last_rank + 1):
            self.together(tell_time, rank, self.control_of_blocks)
        return 0.0

    def explain(self, error: BaseException) -> None:
        """Look for what is behind an error that may come of a broken connection.

        Raises:
            BlockPeerError: If a process has failed or is gone.
        """
        # Broken connections have no type of their own; whether anyone is missing tells them from other errors.
        if isinstance(error, RuntimeError) and not isinstance(error, BlockLocalError):
            self.peers.look_for_missing()

    def fail(self, error: BaseException) -> None:
        """Leave word of an error that ends this process."""
        self._failed = True
        self.peers.report(error)

    @contextmanager
    def session(self) -> Iterator[None]:
        """Keep the streams open inside the `with`.

        All processes of a chain must begin and end it together. After an error the streams are left as they are: the
        process is to end.
        """
        assert not self.in_session, "a session has no sessions within"
        self.in_session = True
        for box in self._boxes:
            box.open()
        yield
        for box in self._boxes:
            box.close()
        self.in_session = False

    def leave(self) -> None:
        """Say no more to anyone: the process is about to end."""
        self.peers.stop()
        if self._failed:
            # Threads that still wait for a neighbour would be cut off in the middle of it.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)


class ReplicaMesh:
    """What accelerate looks at to decide which processes read the same batches: the form of a mesh, and no more.

    Args:
        chain: The place of this process. The processes of a chain read the same.
    """

    mesh_dim_names = ("dp_replicate", "tp")

    def __init__(self, chain: Chain) -> None:
        self._sizes = {"dp_replicate": chain.num_replicas, "tp": chain.num_blocks}

    def __getitem__(self, name: str) -> ReplicaMesh._Dimension:
        return self._Dimension(self._sizes[name])

    @dataclass(frozen=True)
    class _Dimension:
        processes: int

        def size(self) -> int:
            return self.processes


def form_chains(num_blocks: int, device: torch.device, *, peer_timeout: float) -> Chain:
    """Put this process in its place. All processes must call it together.

    Args:
        num_blocks: Blocks, each of which gets a process.
        device: Where this process computes.
        peer_timeout: Seconds without a sign of life after which a process counts as lost.

    Raises:
        UnsupportedSettingError: If the number of processes is not a multiple of the number of blocks, or a GPU is to
            have a single queue.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world % num_blocks != 0:
        fitting = f"--num_processes {max(1, world // num_blocks) * num_blocks}"
        raise UnsupportedSettingError(
            f"block_parallel_size={num_blocks} gives every block a process of its own, and there are {world} "
            f"process(es), which is not a multiple of {num_blocks}. Start with accelerate launch {fitting}, or use "
            f"block_parallel_size=1.{_ON_CPUS if world == 1 and device.type == 'cpu' else ''}"
        )
    rank = dist.get_rank()
    store = dist.PrefixStore(f"hf_blocklocal/{next(_NUMBERS)}", dist.distributed_c10d._get_default_store().clone())
    names = names_of(machines_of_all(store), num_blocks)
    check_reachable()
    check_queues(device, num_blocks)
    mesh = init_device_mesh(device.type, (world // num_blocks, num_blocks), mesh_dim_names=("replica", "block"))
    peers = Peers(store, rank=rank, names=names, timeout=peer_timeout)
    chain = Chain(
        block=rank % num_blocks,
        num_blocks=num_blocks,
        replica=rank // num_blocks,
        num_replicas=world // num_blocks,
        replicas=mesh["replica"].get_group(),
        blocks=mesh["block"].get_group(),
        control=dist.new_group(backend="gloo", timeout=_PATIENCE),
        control_of_blocks=_own_group([range(first, first + num_blocks) for first in range(0, world, num_blocks)]),
        control_of_replicas=_own_group([range(block, world, num_blocks) for block in range(num_blocks)]),
        peers=peers,
        device=device,
    )
    chain.together(_connect, [dist.group.WORLD, chain.replicas, chain.blocks], device)
    outboxes, inboxes = chain.connect([(block, block + 1) for block in range(num_blocks - 1)])
    chain.outbox = next(iter(outboxes.values()), None)
    chain.inbox = next(iter(inboxes.values()), None)
    atexit.register(chain.leave)
    return chain


def _connect(groups: Sequence[dist.ProcessGroup], device: torch.device) -> None:
    """Add up a first number in groups, so that none of them has to connect while a GPU waits; see `Link.greet`.

    In the group of all, too: logs and evaluations gather there, while messages of blocks are under way. NCCL connects
    once more for what is large, and for what is gathered.
    """
    for group in groups:
        dist.all_reduce(torch.zeros(1, device=device), group=group)
        if dist.get_backend(group) != "gloo":
            large = torch.zeros(dist.get_world_size(group), _LARGE, device=device)
            dist.broadcast(large, group=group, group_src=0)
            dist.all_reduce(large, group=group)
            dist.all_gather_into_tensor(large, large[0].clone(), group=group)


def _own_group(members: Sequence[range]) -> dist.ProcessGroup:
    """Make groups that share out all processes, and return this process's."""
    groups = [dist.new_group(list(ranks), backend="gloo", timeout=_PATIENCE) for ranks in members]
    return next(group for group, ranks in zip(groups, members, strict=True) if dist.get_rank() in ranks)
