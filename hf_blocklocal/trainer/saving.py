"""What the trainer writes beside an ordinary checkpoint, and reads back."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from hf_blocklocal.borrowing.copies import Copies, check_no_copies_are_left_out
from hf_blocklocal.checkpoint import check_same_cut, load_heads_, save_heads
from hf_blocklocal.hub import fetch
from hf_blocklocal.optim.anchor import Anchor
from hf_blocklocal.parallel.stationing import Whole
from hf_blocklocal.trainer.spreading import SpreadsBlocks
from hf_blocklocal.trainer.streaming import ConvertedError, can_be_streamed, saved_one_by_one


_MODEL = "model."


class SavesBlocks(SpreadsBlocks):
    """Saves heads, anchor and copies with the model, and resumes from them."""

    @property
    def _keepsakes(self) -> list[Anchor | Copies]:
        """What a run that goes on needs beside weights and heads."""
        return [kept for kept in (self.anchor, self.assembly.copies) if kept is not None]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write config and heads beside the ordinary checkpoint, whichever processes they are in."""
        with self._whole_state() as whole:
            writes = self.args.should_save if whole is None else self._chain.writes
            if whole is None:
                super()._save(output_dir, state_dict)
            elif writes:
                self._save_whole(output_dir, whole)
            if writes:
                folder = output_dir if output_dir is not None else self.args.output_dir
                (self.block_local if self._assembly is None else self._assembly.config).save_pretrained(folder)
                if self._assembly is not None:
                    heads = self._assembly.heads.state_dict()
                    if whole is not None:
                        heads = {name: whole[f"heads.{name}"] for name in heads}
                    save_heads(folder, heads=heads, cut=self._assembly.cut)
        self._meet()

    def _save_whole(self, output_dir: str | None, whole: Whole) -> None:
        """Write a model whose weights are in several processes, one weight at a time if its format allows."""
        names = [name.removeprefix(_MODEL) for name in whole if name.startswith(_MODEL)]
        if can_be_streamed(self.model):
            forms = {name: whole.form(_MODEL + name) for name in names}
            with suppress(ConvertedError), saved_one_by_one(forms, lambda name: whole[_MODEL + name]) as placeholders:
                return super()._save(output_dir, placeholders)
        return super()._save(output_dir, {name: whole[_MODEL + name] for name in names})

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write anchor and copies beside the optimizer, for a run that goes on from here."""
        super()._save_optimizer_and_scheduler(output_dir)
        for kept in self._keepsakes:
            if self._chain is not None:
                state = kept.state()
                if kept is self._anchor:
                    state = {name: self._whole_of(name, tensor) for name, tensor in state.items()}
                self._save_together(state, Path(output_dir) / kept.file_name)
            elif self.args.should_save:
                kept.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Read the optimizer into main memory, where a device need not hold it, or not all of it."""
        # Until transformers 5.18: with several processes on CPUs it looks for a device "cpu:0", which torch has not.
        on_cpus = self.args.world_size > 1 and self.args.device.type == "cpu"
        if checkpoint is None or not (on_cpus or self._chain is not None):
            return super()._load_optimizer_and_scheduler(checkpoint)
        optimizer, scheduler = (Path(checkpoint) / name for name in (OPTIMIZER_NAME, SCHEDULER_NAME))
        if optimizer.is_file() and scheduler.is_file():
            self.optimizer.load_state_dict(torch.load(optimizer, map_location="cpu", weights_only=True))
            self.lr_scheduler.load_state_dict(torch.load(scheduler, weights_only=True))
        return None

    def load_heads(self, source: str, *, revision: str | None = None, token: str | None = None) -> None:
        """Load the heads saved beside a model, so that an evaluation reports what each block would have predicted.

        Args:
            source: A folder, or a repository on the Hub.
            revision: Branch, tag or commit of the repository.
            token: A token that may read it; by default `hub_token`.

        Raises:
            FetchError: If the source cannot be read.
            HeadsMismatchError: If they belong to another model or cut. Nothing has been loaded then.
        """
        folder = fetch(source, revision=revision, token=token or self.args.hub_token)
        load_heads_(self.assembly.heads, folder, cut=self.assembly.cut)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load heads, anchor and copies before the model, so that a checkpoint of another cut changes nothing."""
        check_same_cut(resume_from_checkpoint, cut=self.assembly.cut)
        if self.assembly.copies is None:
            check_no_copies_are_left_out(resume_from_checkpoint)
        for kept in self._keepsakes:
            kept.load_(resume_from_checkpoint)
        self.load_heads(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """Load the heads that belong to the best model, and what they borrow, if the checkpoint holds it."""
        super()._load_best_model()
        best, copies = self.state.best_model_checkpoint, self.assembly.copies
        self.load_heads(best)
        if copies is not None and (Path(best) / copies.file_name).is_file():
            copies.load_(best)
