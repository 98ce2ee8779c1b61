"""Turn a whole assembled model into the one block that this process trains, and connect it with its neighbours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_blocklocal.anatomy.lending import replaced_tensors
from hf_blocklocal.assembly import Assembly
from hf_blocklocal.cut.blocks import Boundaries
from hf_blocklocal.errors import BatchMismatchError, UnsupportedSettingError
from hf_blocklocal.parallel.batches import described, facts_of
from hf_blocklocal.parallel.chain import Chain
from hf_blocklocal.parallel.exchange import WeightExchange
from hf_blocklocal.parallel.gathering import Gathered, gathered_at, gathered_at_first
from hf_blocklocal.parallel.giving import give_to_all
from hf_blocklocal.parallel.proof import check_block_alone
from hf_blocklocal.parallel.sharding import ShardedLayers, check_not_used_outside
from hf_blocklocal.parallel.stage import Stage, let_go_, move_, unneeded_here
from hf_blocklocal.parallel.uses import check_heads_look_up, used_by_heads
from hf_blocklocal.parallel.wire import TensorForm


@dataclass(frozen=True)
class Whole(Mapping[str, Tensor]):
    """All weights of model and heads under the names that one process would give them, each fetched when asked for.

    Attributes:
        gathered: What other processes hold, and this one.
        sources: For each name, what it is called there, or the tensor itself.
    """

    gathered: Gathered
    sources: Mapping[str, str | Tensor]

    def __len__(self) -> int:
        return len(self.sources)

    def __iter__(self) -> Iterator[str]:
        return iter(self.sources)

    def __getitem__(self, name: str) -> Tensor:
        source = self.sources[name]
        return source if isinstance(source, Tensor) else self.gathered[source]

    def form(self, name: str) -> TensorForm:
        """Return what a weight is like, without fetching it."""
        source = self.sources[name]
        return TensorForm.of(source) if isinstance(source, Tensor) else self.gathered.forms[source]


class Stationing:
    """One block of an assembly, at work in this process.

    Attributes:
        names: The name of every parameter; of one that is spread, also that of its part.
        owners: The block that each belongs to.
        sharded: The layers of the block, if they are spread over the processes that hold it.

    Args:
        assembly: The whole model with all heads, on the CPU. What belongs to other blocks is let go.
        chain: The place of this process.
        batch: A small batch with labels, to find out what blocks need.
    """

    def __init__(self, assembly: Assembly, chain: Chain, batch: Mapping[str, Any]) -> None:
        self._assembly, self._chain = assembly, chain
        self.sharded: ShardedLayers | None = None
        model, boundaries = assembly.module.model, assembly.step.boundaries
        self._facts: dict[str, Any] = {}
        self._brought: dict[Tensor, Tensor] = {}
        self.names = {parameter: name for name, parameter in assembly.module.named_parameters()}
        self.owners = {p: block for block, mine in enumerate(assembly.parameters) for p in mine}
        if assembly.step.shortcut is not None:
            check_heads_look_up(assembly, used_by_heads(assembly, batch))
        needs = assembly.needs
        self.owners |= _holders_of_frozen(model, boundaries, needs.parameters)
        unneeded = unneeded_here(model, boundaries, chain.block, needs) - self._lent_as_it_is()
        gone = {name: p for name, p in model.named_parameters() if name in unneeded and not self.is_mine(p)}
        self.unknown_outputs = check_block_alone(
            model, boundaries, chain.block, needs=needs, forms=assembly.forms, gone=gone.keys(), inputs=batch
        )
        copies = assembly.copies
        if copies is not None:
            statistics = {name: assembly.owners[parameter] for name, parameter in copies.beside.items()}
            owners, most = {**assembly.owners, **statistics}, copies.most_under_way
            exchange = WeightExchange(chain, copies.live, copies.lent, owners, most_under_way=most)
            copies.of_block(chain.block, exchange)
        heads = [p for block, head in enumerate(assembly.heads) if block != chain.block for p in head.parameters()]
        let_go_([*gone.values(), *heads])
        boundaries.station = Stage(
            model,
            boundaries,
            chain.block,
            needs=needs,
            forms=assembly.forms,
            receive=self._receive,
            send=self._send,
        )

    def is_mine(self, parameter: nn.Parameter) -> bool:
        """Tell whether a parameter is this process's to train, or to save if it is frozen."""
        return self.owners.get(parameter) == self._chain.block

    def move_(self, device: torch.device) -> None:
        """Move what is here to a device."""
        move_(self._assembly.module, device)
        if self._assembly.copies is not None:
            self._assembly.copies.move_(device)

    def shard_(self) -> Assembly:
        """Spread the layers of the block over the processes that hold it, once the block is where it computes.

        Returns:
            The assembly with what has become of its parameters.

        Raises:
            UnsupportedSettingError: If they cannot be spread.
        """
        assembly, span = self._assembly, self._assembly.cut.spans[self._chain.block]
        before = {name: parameter for parameter, name in self.names.items()}
        layers = {
            path: assembly.module.model.get_submodule(path) for path in assembly.cut.layers[span.start : span.stop]
        }
        check_not_used_outside(assembly.module.model, layers)
        self.sharded = ShardedLayers(layers, self._chain)
        after = {name: p for name, p in assembly.module.named_parameters() if p in self.sharded.parts}
        parts = {before[name]: self.sharded.parts[whole] for name, whole in after.items()}
        for name, whole in after.items():
            owner = self.owners.pop(before[name])
            del self.names[before[name]]
            for parameter in (whole, self.sharded.parts[whole]):
                self.names[parameter], self.owners[parameter] = name, owner
        if assembly.copies is not None:
            assembly.copies.live |= {
                path: after[name] for path in assembly.copies.live if (name := f"model.{path}") in after
            }
        parameters = tuple(tuple(parts.get(p, p) for p in block) for block in assembly.parameters)
        self._assembly = replace(assembly, parameters=parameters, parts=self.sharded.parts)
        return self._assembly

    def announce(self, inputs: Mapping[str, Any], where: tuple[int | str, ...]) -> None:
        """Say what the messages to come belong to.

        Args:
            inputs: The batch.
            where: Its place in the run.
        """
        self._facts = facts_of(inputs, where)

    def state(self) -> dict[str, Tensor]:
        """Return what this process is to contribute to a checkpoint, by name in the whole."""
        block, module = self._chain.block, self._assembly.module
        kept = (parameter for parameter in module.parameters() if self.is_mine(parameter))
        buffers = {name: buffer for name, buffer in module.named_buffers() if self._block_of_buffer(name) == block}
        return {self.names[parameter]: parameter.detach() for parameter in kept} | buffers

    @contextmanager
    def gathered(self) -> Iterator[Whole]:
        """Let the process that writes checkpoints ask for all weights of model and heads inside the `with`.

        All processes must enter it; in the others there are none.
        """
        with gathered_at_first(self._chain, self.state()) as gathered:
            sources: dict[str, str | Tensor] = {}
            if self._chain.writes:
                for name, tensor in self._assembly.module.state_dict(keep_vars=True).items():
                    source = self.names.get(tensor, name)
                    sources[name] = source if source in gathered else tensor.detach()
            yield Whole(gathered, sources)

    def whole_model(self) -> nn.Module:
        """Return the whole model as it is now, in every process, on the CPU and apart from the one that is trained.

        Raises:
            UnsupportedSettingError: If the model cannot be made from its config.
        """
        model = self._assembly.module.model
        if not callable(getattr(type(model), "_from_config", None)):  # the type: adapters pass on what they wrap
            raise UnsupportedSettingError(
                f"{type(model).__name__} cannot be made anew from its config. Save the model, and load it from there."
            )
        forms = {
            name: tensor for name, tensor in self._assembly.module.state_dict().items() if name.startswith("model.")
        }
        with self.gathered() as gathered:
            here = dict(gathered)
        weights = give_to_all(self._chain, here, forms)
        with torch.random.fork_rng():
            whole = type(model)._from_config(model.config)
        whole.load_state_dict({name.removeprefix("model."): tensor for name, tensor in weights.items()})
        return whole.eval()

    @contextmanager
    def brought_to_last(self) -> Iterator[None]:
        """Hold what other blocks have of the model inside the `with` too, if the last block is here; see `as_whole`.

        All processes of a chain must enter it together.
        """
        module, here = self._assembly.module, self.state()
        tensors = {name: parameter for parameter, name in self.names.items()} | dict(module.named_buffers())
        try:
            with gathered_at(self._chain, self._chain.num_blocks - 1, here) as gathered:
                for name in gathered:
                    if name not in here and name.startswith("model."):
                        brought = gathered[name].to(self._chain.device)
                        is_weight = isinstance(tensors[name], nn.Parameter)
                        self._brought[tensors[name]] = (
                            nn.Parameter(brought, requires_grad=False) if is_weight else brought
                        )
            yield
        finally:
            self._brought.clear()

    @contextmanager
    def as_whole(self) -> Iterator[None]:
        """Let the model run inside the `with`, for example to generate, as if all blocks were here.

        It needs what `brought_to_last` brings, and looks around whenever the last layer runs.
        """
        boundaries, module = self._assembly.step.boundaries, self._assembly.module
        last = module.model.get_submodule(boundaries.cut.layers[-1])
        looking = last.register_forward_pre_hook(lambda *_: self._chain.peers.check_all())
        try:
            with replaced_tensors(module.model, self._brought), boundaries.suspended():
                yield
        finally:
            looking.remove()

    def _lent_as_it_is(self) -> set[str]:
        """Return the names of what this block's head uses of later blocks and nobody trains."""
        block, model = self._chain.block, self._assembly.module.model
        lent = self._assembly.lent[block] if block < len(self._assembly.lent) else set()
        return {name for name in lent if not model.get_parameter(name).requires_grad}

    def _block_of_buffer(self, name: str) -> int:
        """Return the block that a buffer belongs to: that of its layer, or of the parameters next to it."""
        part, inside = name.split(".", 1)
        if part == "heads":
            return int(inside.split(".")[0])
        block, module = self._assembly.cut.block_of_path(inside), name
        while block is None:
            module = module.rpartition(".")[0]
            near = (owner for other, owner in self.owners.items() if self.names[other].startswith(f"{module}."))
            block = min(near, default=None)
        return block

    def _receive(self) -> Any:
        message = self._chain.inbox.take()
        if message.facts != self._facts:
            mine, theirs = described(self._facts, message.facts), described(message.facts, self._facts)
            raise BatchMismatchError(
                f"Block {self._chain.block} has read {mine}, and block {self._chain.block - 1} sent what it made of "
                f"{theirs}. All processes of a chain must read the same batches in the same order: seed whatever is "
                "random in data set, sampler and collator, let none of it depend on the rank, and run the model once "
                "for a batch."
            )
        return message.value

    def _send(self, value: Any) -> None:
        self._chain.outbox.send(self._facts, value)


def _holders_of_frozen(
    model: nn.Module, boundaries: Boundaries, needed: Sequence[frozenset[str]]
) -> dict[nn.Parameter, int]:
    """Return, of frozen parameters outside the layers, the last block that uses them, and so has them.

    No loss reaches them, so nothing else says whose they are.
    """
    return {
        parameter: max(block for block, names in enumerate(needed) if name in names)
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad and boundaries.cut.layer_of_path(name) is None and name in set().union(*needed)
    }
