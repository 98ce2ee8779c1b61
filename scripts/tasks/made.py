"""Data sets made at run time from what every Python brings along, in the form that data sets of the Hub have.

Nothing is downloaded. A text never changes sides between train and test.
"""

from __future__ import annotations

import io
import itertools
import keyword
import math
import random
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docstring_corpus import is_test_text

from tasks.definitions import PROPERTIES, definitions, library_files
from tasks.drawn import dates, digits, waves


if TYPE_CHECKING:
    from datasets import DatasetDict, Features

Row = dict[str, Any]
WORD_KINDS = ("keyword", "definition", "call", "attribute", "name", "number", "string", "operator")
LONGEST_LINE, MOST_LINES = 24, 5000


def properties() -> Iterator[tuple[bool, Row]]:
    """What functions do, told from their docstrings: which of five properties."""
    for one in definitions():
        yield one.is_test, {"text": one.prose, "label": [list(PROPERTIES).index(name) for name in one.properties]}


def lengths() -> Iterator[tuple[bool, Row]]:
    """How long functions are, told from their docstrings: the logarithm of their lines to base 2."""
    for one in definitions():
        yield one.is_test, {"text": one.prose, "label": math.log2(one.lines)}


def headers() -> Iterator[tuple[bool, Row]]:
    """Whether a docstring belongs to a header: every other one is that of another function of the same split."""
    draw = random.Random(0)
    for is_test in (False, True):
        mine = [one for one in definitions() if one.is_test == is_test]
        for number, one in enumerate(mine):
            matches = number % 2 == 0
            header = one.header if matches else draw.choice(mine).header
            yield is_test, {"text": one.prose, "header": header, "label": int(matches or header == one.header)}


def code_words() -> Iterator[tuple[bool, Row]]:
    """Lines of the library's code, and what each word is in them: the same word is a call here and a name there."""
    lines = (line for path in library_files() for line in _lines_of_words(path))
    for line in itertools.islice(_once(lines), MOST_LINES):
        words, kinds = zip(*line, strict=True)
        yield (
            is_test_text(" ".join(words)),
            {"tokens": list(words), "tags": [WORD_KINDS.index(kind) for kind in kinds]},
        )


def _once(some: Iterable[Any]) -> Iterator[Any]:
    """Yield each thing when it comes for the first time."""
    seen = set()
    for one in some:
        if one not in seen:
            seen.add(one)
            yield one


def _lines_of_words(path: Path) -> Iterator[tuple[tuple[str, str], ...]]:
    line: list[tokenize.TokenInfo] = []
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8", errors="replace")).readline):
        if token.type in (tokenize.NAME, tokenize.NUMBER, tokenize.STRING, tokenize.OP):
            line.append(token)
        elif token.type == tokenize.NEWLINE:
            if 4 <= len(line) <= LONGEST_LINE and all(len(token.string) <= 40 for token in line):
                yield tuple((token.string, _kind(line, place)) for place, token in enumerate(line))
            line = []


def _kind(line: list[tokenize.TokenInfo], place: int) -> str:
    token = line[place]
    kinds = {tokenize.NUMBER: "number", tokenize.STRING: "string", tokenize.OP: "operator"}
    if token.type in kinds:
        return kinds[token.type]
    if keyword.iskeyword(token.string):
        return "keyword"
    before = line[place - 1].string if place > 0 else ""
    after = line[place + 1].string if place + 1 < len(line) else ""
    if before in ("def", "class"):
        return "definition"
    if after == "(":
        return "call"
    return "attribute" if before == "." else "name"


def questions(entries: int = 3) -> Iterator[tuple[bool, Row]]:
    """What a function does, asked of a list of functions of the same module: the answer is one of their sentences."""
    draw = random.Random(0)
    for _, group in itertools.groupby(definitions(), key=lambda one: one.module):
        for is_test, mine in _by_split(group):
            for some in _runs({one.name: one for one in mine}.values(), entries):
                asked = draw.choice(some)
                text, start = "", 0
                for one in some:
                    text += f"{one.name}: "
                    start = len(text) if one is asked else start
                    text += f"{one.summary} "
                yield (
                    is_test,
                    {
                        "question": f"What does {asked.name} do?",
                        "context": text.strip(),
                        "answers": {"text": [asked.summary], "answer_start": [start]},
                    },
                )


def _by_split(group: Iterable[Any]) -> list[tuple[bool, list[Any]]]:
    every = list(group)
    return [(is_test, [one for one in every if one.is_test == is_test]) for is_test in (False, True)]


def _runs(some: Iterable[Any], length: int) -> Iterator[list[Any]]:
    every = list(some)
    yield from (every[start : start + length] for start in range(0, len(every) - length + 1, length))


def prose() -> Iterator[tuple[bool, Row]]:
    """What the docstrings of the library say."""
    for one in definitions():
        yield one.is_test, {"text": one.prose}


def reference() -> Iterator[tuple[bool, Row]]:
    """The paragraphs of the Language Reference."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
    from learning_tasks.corpora import topic_paragraphs

    for paragraph in topic_paragraphs():
        yield is_test_text(paragraph), {"text": paragraph}


def explanations() -> Iterator[tuple[bool, Row]]:
    """Conversations about functions of the library: how one is called, what it does."""
    for one in definitions():
        asked = {"role": "user", "content": f"What does {one.header} do?"}
        yield one.is_test, {"messages": [asked, {"role": "assistant", "content": one.summary}]}


def _features(name: str) -> Features | None:
    """Return the kinds of columns where they do not show in their values."""
    from datasets import ClassLabel, Features, List, Value

    text = Value("string")
    return {
        "properties": Features({"text": text, "label": List(ClassLabel(names=list(PROPERTIES)))}),
        "headers": Features({"text": text, "header": text, "label": ClassLabel(names=["other", "own"])}),
        "code_words": Features({"tokens": List(text), "tags": List(ClassLabel(names=list(WORD_KINDS)))}),
    }.get(name)


MADE: dict[str, Callable[[], Iterator[tuple[bool, Row]]]] = {
    maker.__name__: maker
    for maker in (
        *(properties, lengths, headers, code_words, questions, prose, reference, explanations),
        *(dates, digits, waves),
    )
}


def make(name: str) -> DatasetDict:
    """Make a data set with the splits train and test.

    Raises:
        ValueError: If none is called that.
    """
    from datasets import Dataset, DatasetDict

    if name not in MADE:
        raise ValueError(f"No data set made:{name} is known. Choose one of {sorted(MADE)}, or name one of the Hub.")
    rows = list(MADE[name]())
    features = _features(name)
    return DatasetDict(
        {
            split: Dataset.from_list([row for is_test, row in rows if is_test == wanted], features=features)
            for split, wanted in (("train", False), ("test", True))
        }
    )
