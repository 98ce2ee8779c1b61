"""How the trainer writes the checkpoint of one process, and reads it, with a block per process."""

from __future__ import annotations

import shutil
import warnings
from collections import ChainMap
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor
from transformers.trainer import OPTIMIZER_NAME

from hf_blocklocal.parallel.gathering import gathered_at_first
from hf_blocklocal.parallel.parcels import gathered_from_chains
from hf_blocklocal.parallel.pickled_file import placeholders_for, write_pickled
from hf_blocklocal.parallel.shards import plain_values_in, state_of, tensors_in
from hf_blocklocal.parallel.stationing import Whole
from hf_blocklocal.parallel.tensor_file import write_tensors
from hf_blocklocal.trainer.stationed import TakesStation


class KeepsApart(TakesStation):
    """Brings together what belongs into a checkpoint."""

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Read the weights of the block that is here."""
        with self._others_left_out():
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_best_model(self) -> None:
        """Read the weights of the block that is here."""
        with self._others_left_out():
            super()._load_best_model()

    @contextmanager
    def _others_left_out(self) -> Iterator[None]:
        """Read checkpoints inside the `with` without a warning for each weight that is not here."""
        with warnings.catch_warnings():
            if self._chain is not None:
                warnings.filterwarnings(
                    "ignore", "for .*: copying from a non-meta parameter in the checkpoint to a meta"
                )
            yield

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Let all processes take part."""
        if self._chain is None or self.args.should_save:
            return super().save_model(output_dir, _internal_call)
        # transformers 5.17 saves in the process that writes alone.
        self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub()
        return None

    def _whole_state(self) -> AbstractContextManager[Whole | None]:
        """Let all weights be asked for inside the `with` where checkpoints are written, if no process has them all."""
        return nullcontext() if self._chain is None else self._stationing.gathered()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write what one process would have written."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self._chain is not None:
            state = self._shard.state_by_name()
            with gathered_at_first(self._chain, tensors_in(state), plain_values_in(state)) as gathered:
                if self._chain.writes:
                    placeholders = placeholders_for(gathered.forms)
                    whole = self._shard.whole(state_of(placeholders, ChainMap(*gathered.said)))
                    path = Path(output_dir) / OPTIMIZER_NAME
                    write_pickled(path, whole, placeholders, gathered.__getitem__)

    def _save_together(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        """Write the tensors of all processes into one file where checkpoints are written."""
        with gathered_at_first(self._chain, tensors) as gathered:
            if self._chain.writes:
                write_tensors(path, gathered.forms, gathered.__getitem__)

    def _save_rng_state(self, output_dir: str) -> None:
        """Write the random state of every chain once, as data-parallel processes would, where the rest is written."""
        if self._chain is None:
            super()._save_rng_state(output_dir)
        elif self._chain.block == 0:
            with TemporaryDirectory() as folder:
                super()._save_rng_state(folder)
                content = (Path(folder) / self._random_state_file).read_bytes()
            for replica, state in enumerate(gathered_from_chains(self._chain, content)):
                (Path(output_dir) / self._random_state_of(replica)).write_bytes(state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Read the random state of this chain, whoever wrote it."""
        names = []
        if self._chain is not None and checkpoint is not None:
            names = [self._random_state_of(self._chain.replica), "rng_state.pth"]
        found = [Path(checkpoint) / name for name in names if (Path(checkpoint) / name).is_file()]
        if not found:
            return super()._load_rng_state(checkpoint)
        with TemporaryDirectory() as folder:
            shutil.copy(found[0], Path(folder) / self._random_state_file)
            return super()._load_rng_state(folder)

    @property
    def _random_state_file(self) -> str:
        return f"rng_state_{self.args.process_index}.pth"

    def _random_state_of(self, replica: int) -> str:
        return f"rng_state_{replica}.pth" if self._chain.num_replicas > 1 else "rng_state.pth"
