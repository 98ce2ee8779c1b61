"""Text that every Python brings along: the Language Reference, and the sources and docstrings of the library.

Nothing is shipped or downloaded. Sources are read, never imported, except for the topics of `help()`.
"""

from __future__ import annotations

import ast
import re
import sys
import sysconfig
import warnings
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from docstring_corpus import LEFT_OUT, first_prose, public_docstrings, runs_of_words, words_of  # noqa: E402


def topic_paragraphs() -> list[str]:
    """Return the paragraphs of the Language Reference, each once, in the order of topics.

    Topics quote each other at length, so a paragraph goes if more than half of its runs of four words came before.
    """
    from pydoc_data.topics import topics

    kept: list[str] = []
    seen: set[tuple[str, ...]] = set()
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            runs = runs_of_words(paragraph)
            if len(words_of(paragraph)) >= 5 and 2 * len(runs & seen) <= len(runs):
                kept.append(paragraph.strip("\n"))
                seen |= runs
    return kept


def library_sources() -> list[Path]:
    """Return the source files of the standard library in a fixed order, without tests and without the topics."""
    root = Path(sysconfig.get_path("stdlib"))
    return [
        path
        for path in sorted(root.rglob("*.py"))
        if LEFT_OUT.isdisjoint(path.relative_to(root).parts) and "pydoc_data" not in path.parts
    ]


def library_prose() -> list[str]:
    """Return the docstrings of the library as they stand, each once, in a fixed order."""
    return list(dict.fromkeys(docstring for path in library_sources() for docstring in public_docstrings(_tree(path))))


def library_code() -> list[str]:
    """Return the source files of the library."""
    return [path.read_text(encoding="utf-8", errors="replace") for path in library_sources()]


def library_openings() -> list[str]:
    """Return the opening prose of the library's docstrings, each once, in a fixed order."""
    return list(dict.fromkeys(prose for docstring in library_prose() if (prose := first_prose(docstring))))


def _tree(path: Path) -> ast.AST:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(path.read_bytes(), filename=str(path))
