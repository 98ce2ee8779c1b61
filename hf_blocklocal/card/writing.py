"""A card on disk: written whole where there is none, and between its markers where somebody else has written too."""

from __future__ import annotations

import os
import re
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from hf_blocklocal.card.facts import CardFacts
from hf_blocklocal.card.metadata import merged, metadata_of
from hf_blocklocal.card.sections import FIELDS, fields_of
from hf_blocklocal.card.template import fill, read_template
from hf_blocklocal.card.use import location_line
from hf_blocklocal.errors import CardError


CARD_NAME = "README.md"
BEGIN = "<!-- hf_blocklocal: written by the run. What stands between these two lines is replaced by the next one. -->"
END = "<!-- hf_blocklocal: end -->"
# How cards begin that nobody has written: the draft of transformers.Trainer, and the empty form that PEFT saves.
DRAFTS = (
    "<!-- This model card has been generated automatically according to the information the Trainer",
    "# Model Card for Model ID",
)


def render(facts: CardFacts, folder: str | os.PathLike[str], *, template: str | os.PathLike[str] | None = None) -> str:
    """Return the text of a card between its markers, without metadata.

    Args:
        facts: What is known of the run.
        folder: Where the card will lie; figures found there are shown.
        template: A Markdown file with `{{ fields }}`; the one of the package by default.

    Raises:
        CardError: If the template is missing or has an unknown field.
    """
    return fill(read_template(template, FIELDS), fields_of(facts, Path(folder)))


def write_card(
    facts: CardFacts, folder: str | os.PathLike[str], *, template: str | os.PathLike[str] | None = None
) -> Path:
    """Write the card of a run into a folder as `README.md`, without a look at the network.

    A card that is there is updated: between the markers of an earlier run, or, where somebody has written it by hand,
    at its end, with everything else left as it is. Drafts and empty forms that libraries leave are replaced.

    Args:
        facts: What is known of the run.
        folder: Where the model lies.
        template: As for `render`.

    Returns:
        The file.

    Raises:
        CardError: If the template has an unknown field, or the card that is there cannot be read or updated.
    """
    path = Path(folder) / CARD_NAME
    body = f"{BEGIN}\n\n{render(facts, folder, template=template)}\n{END}\n"
    data = metadata_of(facts)
    old = _read(path)
    if old is not None:
        ours = BEGIN in old.text
        data = merged(old.data, data, ours=ours)
        body = _between_markers(old.text, body, path) if ours else f"{old.text.rstrip()}\n\n{body}".lstrip("\n")
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body.lstrip()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(str(card), encoding="utf-8")
    return path


def name_location(folder: str | os.PathLike[str], location: str) -> bool:
    """Let the quick start of a card that was written for a folder load the model from the Hub.

    Args:
        folder: The folder.
        location: Id of the repository that the folder is pushed to.

    Returns:
        Whether there was such a line to change.
    """
    path = Path(folder) / CARD_NAME
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    named = text.replace(location_line("."), location_line(location))
    if named != text:
        path.write_text(named, encoding="utf-8")
    return named != text


def _read(path: Path) -> ModelCard | None:
    """Return the card that is there, None if there is none that anybody has written."""
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")
    if BEGIN not in text and any(draft in text for draft in DRAFTS):
        return None
    try:
        # A text without metadata is a card too; an empty block spares the client a warning.
        return ModelCard(text if re.match(r"\s*---", text) else f"---\n\n---\n{text}")
    except (ValueError, yaml.YAMLError) as error:
        raise CardError(f"{path} has metadata that the Hub would refuse: {error} Mend it, or move it away.") from error


def _between_markers(old: str, body: str, path: Path) -> str:
    before, _, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise CardError(
            f"{path} has the line {BEGIN!r} but not {END!r}, so it cannot be told what the run has written. Put the "
            "second line back where your own text goes on, or delete the first."
        )
    return before + body.rstrip("\n") + after
