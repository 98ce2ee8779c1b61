"""What a run leaves to look at: typed rows, one JSON object a line, in `history.jsonl`.

Plain values on disk and back. Nothing here knows trainers, models or figures.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from hf_blocklocal.errors import HistoryError


HISTORY_NAME = "history.jsonl"


@dataclass(frozen=True)
class Row:
    """Something that was seen of a run.

    Attributes:
        step: Optimizer steps taken when it was seen.
    """

    kind: ClassVar[str]
    step: int


@dataclass(frozen=True)
class Logged(Row):
    """Numbers that went through `Trainer.log`, under the names they had there.

    Attributes:
        values: The numbers by name.
    """

    values: dict[str, float]


@dataclass(frozen=True)
class Training(Logged):
    """Losses since the last such row, `block_k/loss` among them, with learning rate and norm of the gradient."""

    kind: ClassVar[str] = "training"


@dataclass(frozen=True)
class Evaluation(Logged):
    """What an evaluation said of the model and of every block's head."""

    kind: ClassVar[str] = "evaluation"


@dataclass(frozen=True)
class Look(Logged):
    """What a callback saw of every block: gradients, probes, drift."""

    kind: ClassVar[str] = "look"


@dataclass(frozen=True)
class Summary(Logged):
    """What a call of `train()` came to."""

    kind: ClassVar[str] = "summary"


# What `taught_by` says of heads that borrow layers.
BORROWED = "layers "
# What it says of heads that run the layers that they do not borrow.
STRAIGHT_PAST = "straight past the others"
# What it says of heads that borrow every layer above their block: theirs is the gradient of the model's own loss.
ALL_ABOVE = " (all above)"
# What it says of heads that borrow copies, and train them.
TRAINED_COPIES = "its own copies of "


@dataclass(frozen=True)
class BlockOfCut:
    """One block of a cut model.

    Attributes:
        first: Its first layer, in the order of execution; None for a single block, which is never counted out.
        last: Its last layer.
        parameters: Parameters of the block.
        head: Parameters of its head.
        cost: Operations of the head as a share of those of the block; None where there is none, or it is not known.
        taught_by: What it learns from, in a few words.
        device: Where it lies.
        rate: Learning rate of its weights, as a share of the run's; None where that is not known.
    """

    first: int | None
    last: int | None
    parameters: int
    head: int
    cost: float | None
    taught_by: str
    device: str
    rate: float | None = None


@dataclass(frozen=True)
class CutRow(Row):
    """How the model was cut.

    Attributes:
        model: Name of the model's class.
        blocks: Its blocks, in forward order.
    """

    kind: ClassVar[str] = "cut"
    model: str
    blocks: tuple[BlockOfCut, ...]

    def __post_init__(self) -> None:
        blocks = tuple(block if isinstance(block, BlockOfCut) else BlockOfCut(**block) for block in self.blocks)
        object.__setattr__(self, "blocks", blocks)


@dataclass(frozen=True)
class StepTime(Row):
    """How long optimizer steps took, without loading of data and without evaluations.

    Attributes:
        seconds: Mean over the steps since the last such row; in the last row of a run, over all its steps.
        steps: How many steps that is.
        process: Which process measured.
        device: What it computes on.
    """

    kind: ClassVar[str] = "step_time"
    seconds: float
    steps: int
    process: int
    device: str


@dataclass(frozen=True)
class Memory(Row):
    """The most memory that was in use so far.

    Attributes:
        device: Which device.
        peak_bytes: The most bytes.
        counted: `"allocated"`, what torch has allocated there, or `"resident"`, all that the process holds of the
            main memory, libraries included.
        process: Which process measured.
    """

    kind: ClassVar[str] = "memory"
    device: str
    peak_bytes: int
    counted: str
    process: int


@dataclass(frozen=True)
class Timeline(Row):
    """A stretch of work on one block in a block-parallel run.

    Attributes:
        block: The block.
        start: When it began, in seconds since any fixed moment of the run, by the clock of the first process.
        stop: When it ended.
        work: What was done, for example `"forward"` or `"backward"`.
    """

    kind: ClassVar[str] = "timeline"
    block: int
    start: float
    stop: float
    work: str = ""


KINDS: dict[str, type[Row]] = {
    row.kind: row for row in (Training, Evaluation, Look, Summary, CutRow, StepTime, Memory, Timeline)
}


def logged(values: Mapping[str, Any], step: int) -> Logged:
    """Make a row of what went through `Trainer.log`; what is no number is left out."""
    numbers = {
        name: value
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
    }
    if "loss" in values:
        return Training(step, numbers)
    if "train_runtime" in values:
        return Summary(step, numbers)
    evaluated = any(name.startswith("eval_") or name.endswith("_runtime") for name in values)
    return Evaluation(step, numbers) if evaluated else Look(step, numbers)


def resumed(rows: Iterable[Row], log_history: Sequence[Mapping[str, Any]], step: int) -> list[Row]:
    """Return the rows that a run resumed at a step has behind it, in order of steps.

    What was logged comes from the state of the checkpoint, which knows exactly what came before it; of the rest,
    later rows are dropped, because the run will make them again.

    Args:
        rows: What a history file holds.
        log_history: `TrainerState.log_history` of the checkpoint.
        step: Steps taken at the checkpoint.
    """
    others = [row for row in rows if not isinstance(row, Logged) and row.step <= step]
    logs = [logged(values, int(values.get("step", 0))) for values in log_history]
    return sorted([*others, *logs], key=lambda row: row.step)


def read_history(path: str | os.PathLike[str]) -> list[Row]:
    """Read a history file.

    A last line without an end is what a run leaves that was killed while it wrote, or is writing now; it is skipped.

    Raises:
        HistoryError: If there is no such file, or a line of it is no row. The message names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise HistoryError(
            f"There is no {path}. BlockLocalTrainer writes it with the first checkpoint, save_model() or save_state() "
            "of a run; give the folder of a run that has saved something."
        )
    *lines, _unfinished = path.read_text(encoding="utf-8").split("\n")
    return [_parse(line, f"line {number} of {path}") for number, line in enumerate(lines, 1) if line.strip()]


def write_history(path: str | os.PathLike[str], rows: Iterable[Row]) -> None:
    """Write a history file whole, so that at no moment there is half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"_{path.name}.draft")
    draft.write_text("".join(map(_line, rows)), encoding="utf-8")
    draft.replace(path)


def append_row(path: str | os.PathLike[str], row: Row) -> None:
    """Add a row to a history file."""
    with Path(path).open("a", encoding="utf-8") as file:
        file.write(_line(row))


def _line(row: Row) -> str:
    values = {"kind": row.kind, **asdict(row)}
    if isinstance(row, Logged):  # JSON has no word for what is not finite
        values["values"] = {name: value if math.isfinite(value) else None for name, value in row.values.items()}
    return json.dumps(values) + "\n"


def _parse(line: str, where: str) -> Row:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise HistoryError(
            f"{where[0].upper()}{where[1:]} is no JSON ({error.msg}): {line[:80]!r}. Delete the line, or move the "
            "file away to start a new history."
        ) from error
    kind = values.pop("kind", None) if isinstance(values, dict) else None
    if kind not in KINDS:
        raise HistoryError(f"{where[0].upper()}{where[1:]} is of kind {kind!r}. Known are {sorted(KINDS)}.")
    try:
        if issubclass(KINDS[kind], Logged):
            numbers = values["values"].items()
            values["values"] = {name: math.nan if value is None else value for name, value in numbers}
        return _checked(KINDS[kind](**values))
    except (TypeError, KeyError, AttributeError) as error:
        names = [field.name for field in fields(KINDS[kind])]
        raise HistoryError(
            f"{where[0].upper()}{where[1:]} does not hold what a row of kind {kind!r} holds, {names}: {line[:80]!r}."
        ) from error


def _checked(row: Row) -> Row:
    """Refuse what figures and tables could not be made of."""
    numbers = row.values.values() if isinstance(row, Logged) else ()
    named = [getattr(row, name) for name in ("seconds", "peak_bytes", "start", "stop", "block") if hasattr(row, name)]
    for value in (row.step, *numbers, *named):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{value!r} is no number")
    return row
