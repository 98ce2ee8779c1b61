"""The fields of a card: what each says of a run, in Markdown; nothing where there is nothing to say."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hf_blocklocal.card import tables, use
from hf_blocklocal.card.facts import CardFacts


METHOD = "[block-local learning](https://arxiv.org/abs/2305.14974)"
# Titles of the figures that `hf_blocklocal.plots` draws, in the order in which a card shows them.
FIGURES = {
    "cut": "The cut",
    "loss": "Loss of each block in training",
    "evaluation_loss": "Loss of each block's head on the evaluation set",
    "accuracy": "Accuracy of each block's head on the evaluation set",
    "accuracy_by_depth": "Accuracy by depth",
    "memory": "Memory by device",
    "timeline": "Who computed what when",
}
PLOTS = "plots"


def fields_of(facts: CardFacts, folder: Path) -> dict[str, str | None]:
    """Return the text of every field.

    Args:
        facts: What is known of the run.
        folder: Where the card will lie; figures found there are shown.
    """
    return {name: write(facts, folder) for name, write in FIELDS.items()}


def summary(facts: CardFacts) -> str:
    """Say in one sentence what the model is."""
    origin = f"fine-tuned from {_link(facts.base_model.name)}" if facts.base_model and facts.base_model.name else None
    origin = origin or ("fine-tuned" if facts.base_model is not None else "trained from scratch")
    data = f" on {facts.data.name}" if facts.data is not None and facts.data.name else ""
    what = f"`{facts.architecture}` with {facts.parameters:,} parameters, {origin}{data}"
    if len(facts.blocks) == 1:
        return f"{what} by ordinary backpropagation, as a single block of hf_blocklocal."
    how = f"{what} by {METHOD}: it was cut into {len(facts.blocks)} blocks, and each learned from a loss of its own"
    return f"{how}." if facts.whole_backward else f"{how}, without a backward pass through the whole network."


def curves(facts: CardFacts, folder: Path) -> str | None:
    """Show the figures that lie beside the card."""
    found = {path.stem: path for path in sorted((folder / PLOTS).glob("*.png"))}
    order = [*(name for name in FIGURES if name in found), *(name for name in found if name not in FIGURES)]
    titles = {name: FIGURES.get(name, name.replace("_", " ").capitalize()) for name in order}
    return "\n\n".join(f"![{title}]({PLOTS}/{name}.png)" for name, title in titles.items()) or None


def origin(facts: CardFacts) -> str:
    """Name the base model."""
    if facts.base_model is None:
        return "Base model: none; the weights were random at the start."
    if facts.base_model.name is None:
        return "Base model: one that was loaded from a folder which does not say what it is."
    return f"Base model: {_link(facts.base_model.name)}."


def data(facts: CardFacts) -> str | None:
    """Name the data set, its size and its licence."""
    found = facts.data
    if found is None:
        return None
    name = _link(found.hub_id, "datasets/") if found.hub_id else found.name
    said = [f"Data set: {name}" if name else "Data set: not named by the run"]
    said += [f"configuration `{found.config}`"] if found.config else []
    said += [f"commit `{found.revision}`"] if found.revision else []
    said += [f"{found.train_rows:,} training examples"] if found.train_rows else []
    said += [f"licence {found.license}" if found.license else "licence not recorded"]
    return ", ".join(said) + "."


def licence(facts: CardFacts) -> str:
    """Name the licence, and where it comes from."""
    if facts.license is not None:
        return f"Licence: {facts.license}."
    if facts.inherited_license is not None:
        return f"Licence: {facts.inherited_license}, inherited from the base model."
    if facts.base_model is None:
        return "Licence: none was stated."
    return "Licence: unknown. The base model states none that was found where it was loaded from."


def reproduction(facts: CardFacts) -> str | None:
    """Name the file and the command that make this model again."""
    said = [f"Configuration: `{facts.config}`."] if facts.config else []
    said += [f"Command: `{facts.command}`."] if facts.command else []
    return " ".join(said) or None


def arguments(facts: CardFacts) -> str | None:
    """List what differs from the defaults."""
    rows = [(f"`{name}`", f"`{_value(value)}`", "BlockLocalConfig") for name, value in facts.block_local.items()]
    rows += [(f"`{name}`", f"`{_value(value)}`", "TrainingArguments") for name, value in facts.arguments.items()]
    return tables.table(("argument", "value", "of"), rows) if rows else None


def environment(facts: CardFacts) -> str | None:
    """List versions, commit and hardware."""
    return "\n".join(f"- {name}: {value}" for name, value in facts.environment.items()) or None


def limits(facts: CardFacts) -> str:
    """Say what the run does not show."""
    seed = "" if facts.seed is None else f" with seed {facts.seed}"
    said = [f"One run{seed}: how much another would differ is not known."]
    if len(facts.blocks) > 1 and facts.baseline is None:
        said.append("Block-local learning can fall short of backpropagation; no run beside this one says by how much.")
    if facts.steps_of_session is not None and facts.steps_of_session[0] > 0:
        first, last = facts.steps_of_session
        said.append(f"Time was measured over steps {first:,} to {last:,} only: the run was resumed.")
    if facts.base_model is not None:
        said.append("What the base model cannot do, and the biases it has, were not looked at.")
    return "\n".join(f"- {sentence}" for sentence in (*facts.limits, *said))


def citations(facts: CardFacts) -> str | None:
    """List the papers of the losses and heads."""
    linked = [re.sub(r"arXiv (\d+\.\d+)", r"[arXiv \1](https://arxiv.org/abs/\1)", text) for text in facts.citations]
    return "\n".join(f"- {text}." for text in linked) or None


def _link(hub_id: str, kind: str = "") -> str:
    return f"[{hub_id}](https://huggingface.co/{kind}{hub_id})"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={_value(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value))
    return str(value)


def _of_facts(write: Callable[[CardFacts], str | None]) -> Callable[[CardFacts, Path], str | None]:
    return lambda facts, _folder: write(facts)


FIELDS: dict[str, Callable[[CardFacts, Path], str | None]] = {
    "name": lambda facts, _folder: facts.name,
    "curves": curves,
    **{
        write.__name__: _of_facts(write)
        for write in (
            summary,
            use.quick_start,
            use.requirements,
            tables.cut,
            tables.cut_explained,
            tables.results,
            tables.results_explained,
            tables.baseline,
            tables.memory_and_time,
            tables.memory_explained,
            origin,
            data,
            licence,
            reproduction,
            arguments,
            environment,
            limits,
            citations,
        )
    },
}
