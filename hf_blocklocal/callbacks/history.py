"""The history of a run: typed rows of what it logs and of how long and how much it takes, in `history.jsonl`."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_blocklocal.callbacks.portrait import blocks_of, devices_of
from hf_blocklocal.errors import HistoryError
from hf_blocklocal.optim.collectives import gather_from_processes
from hf_blocklocal.records.history import (
    HISTORY_NAME,
    CutRow,
    Memory,
    Row,
    StepTime,
    Training,
    append_row,
    logged,
    read_history,
    resumed,
    write_history,
)
from hf_blocklocal.records.lane import Lane
from hf_blocklocal.records.memory import name_of, peaks_so_far


logger = logging.getLogger(__name__)


@dataclass
class Clock:
    """Adds up what steps have taken."""

    seconds: float = 0.0
    steps: int = 0

    def add(self, seconds: float) -> None:
        """Add a step."""
        self.seconds, self.steps = self.seconds + seconds, self.steps + 1


class HistoryCallback(TrainerCallback):
    """Keeps the history of a run, and writes it where the run saves anything at all.

    Every `BlockLocalTrainer` has one. Rows are held by the first process. The file appears in the output folder when
    training starts, or, with `save_strategy="no"`, with the first `save_model()` or `save_state()`, and from then on
    grows row by row. It replaces that of an earlier run; a run that is resumed goes on with what came before its
    checkpoint. At the end of training each process says how long its steps took and what memory its devices needed,
    and, where blocks are in several, when it worked in the last few steps.

    Args:
        trainer: The `BlockLocalTrainer` to look at.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.rows: list[Row] = []
        self._file: Path | None = None
        self._began = 0.0
        self._run, self._since_log = Clock(), Clock()
        self._lane: Lane | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start anew, or where the checkpoint of a resumed run ends."""
        self._run, self._since_log = Clock(), Clock()
        chain, assembly = self.trainer._chain, self.trainer.assembly
        # Chains are copies of each other: one of them is enough to look at.
        self._lane = None if chain is None or chain.replica > 0 else Lane(chain.block, chain.waits)
        here = devices_of(assembly, only=None if chain is None else chain.block)
        everywhere = gather_from_processes(here, args.world_size)
        if not state.is_world_process_zero:
            return
        self._file = None
        self.rows = _rows_behind(Path(args.output_dir) / HISTORY_NAME, state) if state.global_step > 0 else []
        devices = {block: device for some in reversed(everywhere) for block, device in some.items()}
        cut = CutRow(state.global_step, type(self.trainer.model).__name__, blocks_of(assembly, devices))
        if not any(isinstance(row, CutRow) and row.blocks == cut.blocks for row in self.rows):
            self.rows.append(cut)
        if args.save_strategy != "no":
            self.save(args.output_dir)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._began = time.perf_counter()
        if self._lane is not None:
            self._lane.begin()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the clock."""
        took = time.perf_counter() - self._began
        self._run.add(took)
        self._since_log.add(took)
        if self._lane is not None:
            self._lane.end(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep what is logged, and beside losses what their steps have taken."""
        if not state.is_world_process_zero or not logs:
            return
        row = logged(logs, state.global_step)
        self.add(row)
        if isinstance(row, Training) and self._since_log.steps:
            for seen in self._of_this_process(self._since_log):
                self.add(seen)
            self._since_log = Clock()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Be on disk where a checkpoint is."""
        if state.is_world_process_zero and self._file is None:
            self.save(args.output_dir)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let every process say what it has taken in all."""
        mine = self._of_this_process(self._run)
        if self._lane is not None:
            mine += self._lane.rows(self.trainer._chain.first_is_ahead_by())
        for rows in gather_from_processes(mine, args.world_size):
            for row in rows if state.is_world_process_zero else ():
                self.add(row)

    def take_over(self, other: HistoryCallback) -> None:
        """Go on where another one stops, whose place this one takes."""
        self.rows, self._file = other.rows, other._file
        self._began, self._run, self._since_log = other._began, other._run, other._since_log
        self._lane = other._lane

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the rows so far into a folder; that of the run is kept up to date from then on."""
        if not self.rows:
            return
        path = Path(folder) / HISTORY_NAME
        write_history(path, self.rows)
        if path.absolute() == (Path(self.trainer.args.output_dir) / HISTORY_NAME).absolute():
            self._file = path

    def add(self, row: Row) -> None:
        """Keep a row that somebody else has made; in the first process only."""
        self.rows.append(row)
        if self._file is not None:
            append_row(self._file, row)

    def _of_this_process(self, clock: Clock) -> list[Row]:
        """Return the rows of a process: its time, if it has taken a step, and its memory."""
        step, args = self.trainer.state.global_step, self.trainer.args
        blocks = self.trainer.assembly.parameters
        devices = [args.device, *(parameter.device for block in blocks for parameter in block)]
        rows: list[Row] = [
            Memory(step, device, peak, counted, args.process_index)
            for device, (peak, counted) in peaks_so_far(devices).items()
        ]
        if clock.steps:
            mean = clock.seconds / clock.steps
            rows.insert(0, StepTime(step, mean, clock.steps, args.process_index, name_of(args.device)))
        return rows


def _rows_behind(path: Path, state: TrainerState) -> list[Row]:
    """Return the rows that a resumed run has behind it; a file that cannot be read is moved aside."""
    rows: list[Row] = []
    try:
        rows = read_history(path)
    except HistoryError as error:
        if path.is_file():
            aside = path.with_name(f"{path.name}.unreadable")
            path.replace(aside)
            logger.warning("%s It is kept as %s; what was logged is taken from the checkpoint.", error, aside.name)
    return resumed(rows, state.log_history, state.global_step)
