"""Fill a template: `{{ field }}` becomes text, and what a run has nothing to say about leaves no trace.

Knows nothing of models, nor which fields there are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from hf_blocklocal.errors import CardError


TEMPLATE = Path(__file__).parents[1] / "templates" / "model_card.md"
_FIELD = re.compile(r"\{\{(.*?)\}\}")
_HEADING = re.compile(r"(#+) ")


def read_template(path: str | os.PathLike[str] | None, known: Iterable[str]) -> str:
    """Read a template and check the names of its fields.

    Args:
        path: The file; None is the one that comes with the package.
        known: Names of fields that can be filled.

    Raises:
        CardError: If there is no such file, or it has a field that is not known.
    """
    path = TEMPLATE if path is None else Path(path)
    if not path.is_file():
        raise CardError(f"There is no template {path}. Leave it out for the one of the package, {TEMPLATE}.")
    text, known = path.read_text(encoding="utf-8"), sorted(known)
    for field in _FIELD.findall(text):
        if field.strip() not in known:
            raise CardError(f"The template {path} has an unknown field {field.strip()!r}. Known are {known}.")
    return text


def fill(template: str, fields: Mapping[str, str | None]) -> str:
    """Return the text of a template.

    A line with a field that is None or empty is left out, and so is a heading with nothing below it.
    """
    lines = []
    for line in template.splitlines():
        names = [name.strip() for name in _FIELD.findall(line)]
        if all(fields[name] for name in names):
            lines.append(_FIELD.sub(lambda match: fields[match[1].strip()] or "", line))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(_without_empty_headings(lines)).strip()) + "\n"


def _without_empty_headings(lines: list[str]) -> list[str]:
    """Drop headings that are followed by the end, or by a heading of the same or a higher rank."""
    kept: list[str] = []
    rank_below: int | None = 0  # of the heading that comes next, None if there is text before it
    in_code = False
    for line in reversed(lines):
        in_code ^= line.count("```") % 2 == 1
        heading = None if in_code else _HEADING.match(line)
        if heading and rank_below is not None and len(heading[1]) >= rank_below:
            continue
        kept.append(line)
        if heading:
            rank_below = len(heading[1])
        elif line.strip():
            rank_below = None
    return kept[::-1]
