"""Turn a whole assembled model into the one block that this process trains, and connect it with its neighbours."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_blocklocal.assembly import Assembly
from hf_blocklocal.blocks import Boundaries
from hf_blocklocal.errors import BatchMismatchError, UnsupportedSettingError
from hf_blocklocal.parallel.chain import Chain
from hf_blocklocal.parallel.exchange import WeightExchange
from hf_blocklocal.parallel.gathering import gather_to_first, give_to_all
from hf_blocklocal.parallel.needs import trace_needs
from hf_blocklocal.parallel.stage import Stage, let_go_, move_, unneeded_here


class Stationing:
    """One block of an assembly, at work in this process.

    Args:
        assembly: The whole model with all heads, on the CPU. What belongs to other blocks is let go.
        chain: The place of this process.
        batch: A small batch with labels, to find out what blocks need.
    """

    def __init__(self, assembly: Assembly, chain: Chain, batch: Mapping[str, Any]) -> None:
        self._assembly, self._chain = assembly, chain
        model, boundaries = assembly.module.model, assembly.step.boundaries
        self._facts: dict[str, Any] = {}
        self.names = {parameter: name for name, parameter in assembly.module.named_parameters()}
        self.owners = {p: block for block, mine in enumerate(assembly.parameters) for p in mine}
        needs = trace_needs(model, boundaries, batch)
        self.owners |= _holders_of_frozen(model, boundaries, needs.parameters)
        unneeded = unneeded_here(model, boundaries, chain.block, needs) - self._lent_as_it_is()
        copies = assembly.copies
        if copies is not None:
            statistics = {name: assembly.owners[parameter] for name, parameter in copies.beside.items()}
            exchange = WeightExchange(chain, copies.live, copies.lent, {**assembly.owners, **statistics})
            copies.of_block(chain.block, exchange)
        heads = [p for block, head in enumerate(assembly.heads) if block != chain.block for p in head.parameters()]
        let_go_([p for name, p in model.named_parameters() if name in unneeded and not self.is_mine(p)] + heads)
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

    def announce(self, inputs: Mapping[str, Any], where: tuple[int | str, ...]) -> None:
        """Say what the messages to come belong to.

        Args:
            inputs: The batch.
            where: Its place in the run.
        """
        self._facts = {"where": list(where), "batch": checksum(inputs)}

    def state(self) -> dict[str, Tensor]:
        """Return what this process is to contribute to a checkpoint, by name in the whole."""
        block, module = self._chain.block, self._assembly.module
        kept = (parameter for parameter in module.parameters() if self.is_mine(parameter))
        buffers = {name: buffer for name, buffer in module.named_buffers() if self._block_of_buffer(name) == block}
        return {self.names[parameter]: parameter.detach() for parameter in kept} | buffers

    def checkpoint(self) -> dict[str, Tensor]:
        """Return all weights of model and heads by name, gathered where checkpoints are written; elsewhere nothing."""
        gathered, _ = gather_to_first(self._chain, self.state())
        if not self._chain.writes:
            return {}
        module = self._assembly.module
        whole = {}
        for name, tensor in module.state_dict(keep_vars=True).items():
            whole[name] = gathered.get(self.names.get(tensor, name), tensor.detach())
        return whole

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
        weights = give_to_all(self._chain, self.checkpoint(), forms)
        with torch.random.fork_rng():
            whole = type(model)._from_config(model.config)
        whole.load_state_dict({name.removeprefix("model."): tensor for name, tensor in weights.items()})
        return whole.eval()

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
            raise BatchMismatchError(
                f"Block {self._chain.block} has read {_told(self._facts)}, and block {self._chain.block - 1} sent "
                f"what it made of {_told(message.facts)}. All processes of a chain must read the same batches in the "
                "same order: seed whatever is random in data set, sampler and collator, and let none of it depend on "
                "the rank."
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


def checksum(inputs: Mapping[str, Any]) -> list[Any]:
    """Return the shape and a checksum of the labels and the mask of a batch."""
    told: list[Any] = []
    for name in ("labels", "attention_mask"):
        tensor = inputs.get(name)
        if isinstance(tensor, Tensor):
            content = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
            told.append([name, list(tensor.shape), zlib.crc32(content)])
    return told


def _told(facts: Mapping[str, Any]) -> str:
    batch = ", ".join(f"{name} {shape} with checksum {number:08x}" for name, shape, number in facts["batch"])
    return f"at {' '.join(map(str, facts['where']))} a batch of {batch or 'no labels'}"
