"""Text of a card that is counted or measured: the cut, results, memory and time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from hf_blocklocal.card.facts import CardFacts, RunResult
from hf_blocklocal.records.history import ALL_ABOVE, BORROWED, STRAIGHT_PAST, TRAINED_COPIES


NO_BASELINE = (
    "No baseline was run: how ordinary backpropagation would have done with the same budget is not known from this "
    "run."
)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; every column but the first is aligned to the right if it holds numbers."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    columns = [[row[index] for row in rows] for index in range(len(header))]
    marks = [
        "---:" if index and all(_numeric(cell) for cell in column) else "---" for index, column in enumerate(columns)
    ]
    lines = [header, marks, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _numeric(cell: str) -> bool:
    return not cell or cell[0].isdigit() or cell[0] in "-<*"


def number(value: float) -> str:
    """Write a metric: three decimals near 1, four digits elsewhere."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.3f}" if 0.001 <= abs(value) < 100 or value == 0 else f"{value:.4g}"


def size(count: float) -> str:
    """Write bytes."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """Write seconds, as hours and minutes from an hour on."""
    if seconds < 3600:
        return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min"


def cut(facts: CardFacts) -> str:
    """Return a row per block."""
    rows = []
    for index, block in enumerate(facts.blocks):
        layers = "all" if block.first is None else f"{block.first}-{block.last}"
        cost = "" if block.cost is None else "<1%" if block.cost < 0.01 else f"{block.cost:.0%}"
        head = f"{block.head:,}" if index < len(facts.blocks) - 1 else ""
        rows.append((str(index), layers, f"{block.parameters:,}", head, cost, block.taught_by, block.device))
    header = ("block", "layers", "parameters", "parameters of its head", "cost of its head", "taught by", "device")
    if _has_rates(facts):
        header = (*header, "learning rate")
        rows = [(*row, f"{block.rate:.0%}") for row, block in zip(rows, facts.blocks, strict=True)]
    return table(header, rows)


def _has_rates(facts: CardFacts) -> bool:
    """Tell whether blocks learned at several rates."""
    rates = {block.rate for block in facts.blocks}
    return len(rates) > 1 and None not in rates


def cut_explained(facts: CardFacts) -> str:
    """Explain the columns of the cut."""
    if len(facts.blocks) == 1:
        return "A single block is ordinary backpropagation: the loss reaches every layer."
    reach = (
        "No gradient of a block's loss changes another block"
        if facts.overlap == 0
        else f"The gradient of a block's loss changes the block itself and {facts.overlap} below it"
    )
    said = (
        f"{reach}. Heads were there for training; they lie beside the model, in `block_local_heads.safetensors`, and "
        "are no part of it. Layers are counted in the order of execution. The cost of a head is relative to the "
        "operations of its block, in a training step."
    )
    if _has_rates(facts):
        said += " The learning rate of a block's weights is a share of the run's, at which its head learned."
    if facts.global_steps > 0:
        said += (
            f" In {facts.global_steps:.1%} of the optimizer steps the gradient went through the whole model instead, "
            "as in ordinary backpropagation."
        )
    return said


def results(facts: CardFacts) -> str | None:
    """Return the metrics of every head, of the model, and of the baseline; None where nothing was evaluated."""
    if not facts.result.of_model():
        return None
    of_heads = [name for metrics in facts.result.of_blocks().values() for name in metrics]
    names = list(dict.fromkeys([*facts.result.of_model(), *of_heads]))
    entries: list[tuple[str, Mapping[str, float], RunResult | None]] = [
        (f"head of block {block}", metrics, None) for block, metrics in facts.result.of_blocks().items()
    ]
    entries.append((f"**this model** ({facts.result.name})", facts.result.of_model(), facts.result))
    if facts.baseline is not None:
        entries.append((f"baseline: {facts.baseline.name}", facts.baseline.of_model(), facts.baseline))
    runs = [run for _, _, run in entries if run is not None]
    extra = {
        "optimizer steps": lambda run: "" if run.steps is None else f"{run.steps:,}",
        "training": lambda run: "" if run.seconds is None else duration(run.seconds),
        "peak activations of a step": lambda run: "" if run.peak_bytes is None else size(run.peak_bytes),
    }
    extra = {name: write for name, write in extra.items() if any(map(write, runs))}
    rows = [
        [
            title,
            *(number(metrics[name]) if name in metrics else "" for name in names),
            *("" if run is None else write(run) for write in extra.values()),
        ]
        for title, metrics, run in entries
    ]
    return table(["", *names, *extra], rows)


def results_explained(facts: CardFacts) -> str | None:
    """Say what was evaluated, when, and how much chance there is in it."""
    if not facts.result.of_model():
        return "The model was not evaluated during or after this run."
    said = []
    data, result = facts.data, facts.result
    if data is not None and data.eval_rows:
        split = f" of the split `{data.eval_split}`" if data.eval_split else ""
        said.append(f"Evaluated on {data.eval_rows:,} examples{split}.")
        accuracy = result.of_model().get("accuracy")
        if accuracy is not None and 0 <= accuracy <= 1 and len(facts.blocks) > 0:
            error = math.sqrt(accuracy * (1 - accuracy) / data.eval_rows)
            said.append(f"One run; if each example counts once, the standard error of its accuracy is {error:.3f}.")
    if result.evaluated_at is not None and result.steps is not None and result.evaluated_at != result.steps:
        said.append(f"The numbers are those after step {result.evaluated_at:,} of {result.steps:,}.")
    if result.of_blocks():
        if any(BORROWED in block.taught_by for block in facts.blocks):
            said.append(
                "The head of a block says what the model would have predicted had there been nothing above the block "
                "but the layers that its head borrows, and the task head."
            )
        else:
            said.append("The head of a block says what the model would have predicted had it ended there.")
        if any(ALL_ABOVE in block.taught_by for block in facts.blocks):
            said.append(
                "A head that borrows all layers above its block is the model itself: such a block learns from the "
                "gradient of the model's own loss."
            )
        if any(STRAIGHT_PAST in block.taught_by for block in facts.blocks):
            said.append(
                "It learned with all layers above it (`head_bypass`), and is asked here without those that it does "
                "not borrow: so read its numbers neither as what its block has learned nor beside its training loss."
            )
        if any(TRAINED_COPIES in block.taught_by for block in facts.blocks):
            said.append(
                "It did so with copies of the layers above it that it had trained itself. They are not saved: a "
                "smaller model of the layers that are will predict something else."
            )
    return " ".join(said) or None


def baseline(facts: CardFacts) -> str:
    """Say whether the baseline had the same budget, or that there is none."""
    if facts.baseline is None:
        return NO_BASELINE
    pairs = {
        "optimizer steps": (facts.result.steps, facts.baseline.steps),
        "epochs": (facts.result.epochs, facts.baseline.epochs),
    }
    known = {name: pair for name, pair in pairs.items() if None not in pair}
    other = [f"{theirs:,g} {name} against {ours:,g}" for name, (ours, theirs) in known.items() if ours != theirs]
    if other:
        return f"The baseline did not have the same budget: {', '.join(other)}."
    if len(known) == len(pairs):
        return "The baseline had the same budget: as many optimizer steps, over as many epochs."
    return "Whether the baseline had the same budget is not recorded."


def memory_and_time(facts: CardFacts) -> str | None:
    """Return a row per device; None if the run left no such rows in its history."""
    rows = []
    for peak in facts.peaks:
        times = [time for time in facts.times if (time.process, time.device) == (peak.process, peak.device)]
        step = f"{duration(times[-1].seconds)} (mean of {times[-1].steps:,})" if times else ""
        rows.append((str(peak.process), peak.device, size(peak.peak_bytes), peak.counted, step))
    if not rows:
        return None
    return table(("process", "device", "peak memory", "counted", "optimizer step"), rows)


def memory_explained(facts: CardFacts) -> str | None:
    """Explain what is counted."""
    counted = {peak.counted for peak in facts.peaks}
    said = []
    if "allocated" in counted:
        said.append("Allocated is what torch held on the device at its peak, weights and optimizer included.")
    if "resident" in counted:
        said.append("Resident is the most main memory that the whole process has held, libraries included.")
    if facts.peaks:
        said.append("Loading of data and evaluations are not in the time of a step.")
    return " ".join(said) or None
