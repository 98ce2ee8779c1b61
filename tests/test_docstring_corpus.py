"""The quickstart's data are real, clean, and the same wherever they are made."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest


SCRIPTS = Path(__file__).parents[1] / "scripts"

EMAIL = '''
raise RuntimeError("whoever imports this file has failed the test")

def parse(source):
    """parse(source) -> message

    Parse an Email message from *source*, using :class:`~email.parser.Parser` and nothing else.

    Args:
        source: never part of the text.
    """
    def helper():
        """A function inside a function is nobody's business but that function's own."""

def _private():
    """A name with an underscore in front is not public, so it must not turn up."""

class Header:
    """Too short to learn from."""

    if True:
        def fold(self):
            """Fold a long header over several lines, none of which is longer than ``max_line_length``.

            >>> Header().fold()
            """
'''
COPIES = '''
def wait():
    """Wait until the lock has been released by the thread that holds it at the moment."""

class Lock:
    def wait(self):
        """Wait until the lock has been released by the thread that holds it at the moment!"""

    async def wait_for(self):
        """Wait until the lock has been released by the thread that holds it at the moment, or time is up."""
'''


@pytest.fixture
def corpus(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("docstring_corpus")


@pytest.fixture
def prepare(corpus):
    return importlib.import_module("prepare_quickstart")


@pytest.fixture
def sources(tmp_path):
    root = tmp_path / "lib"
    unwanted = "def found():\n    '''This text must not be found, wherever the list of examples is looked at.'''\n"
    files = {
        "email/parser.py": EMAIL,
        "threading.py": COPIES,
        "email/tests/test_parser.py": unwanted,
        "idlelib/idle_test/test_tree.py": unwanted,
        "site-packages/email/parser.py": unwanted,
        "not_in_the_library.py": unwanted,
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def overlap(corpus, first, second):
    """The share of the shorter text's runs of four words that the longer one has too."""
    one, other = corpus.runs_of_words(first), corpus.runs_of_words(second)
    return len(one & other) / min(len(one), len(other))


def test_public_docstrings_become_texts_with_the_chapter_of_their_module(corpus, sources):
    assert {example.text: example.chapter for example in corpus.build_corpus(sources)} == {
        "Parse an <module> message from source, using <module>.parser.Parser and nothing else.": "internet",
        "Fold a long header over several lines, none of which is longer than max_line_length.": "internet",
        "Wait until the lock has been released by the thread that holds it at the moment, or time is up.": (
            "concurrency"
        ),
    }


def test_a_folder_without_sources_is_refused(corpus, tmp_path):
    with pytest.raises(ValueError, match="no docstrings"):
        corpus.build_corpus(tmp_path)


@pytest.mark.parametrize(
    ("text", "module", "masked"),
    [
        ("Read an Email, not emails.", "email", "Read an <module>, not emails."),
        ("See xml.dom and XML.", "xml", "See <module>.dom and <module>."),
        ("A Decimal of the decimal module.", "_pydecimal", "A <module> of the <module> module."),
        ("Return the Tk widget.", "tkinter", "Return the <module> widget."),
        ("Return the queue.", "email", "Return the queue."),
    ],
)
def test_a_module_is_never_named(corpus, text, module, masked):
    assert corpus.mask_module(text, module) == masked


@pytest.mark.parametrize(
    ("docstring", "prose"),
    [
        ("Use ``x`` and :func:`os.walk`, **not** `y`.", "Use x and os.walk, not y."),
        ("index(value) -> int -- find the first of them", "find the first of them."),
        ("Take *args and **kwargs as they are.", "Take *args and **kwargs as they are."),
        ("Sum it all up.\n\nThen the rest.\n\n>>> total()\n\nNo more.", "Sum it all up. Then the rest."),
        ("Open a file. For example:\n\n    open(1)", "Open a file."),
        ("Draw a long line.\nArguments:\nx -- a number", "Draw a long line."),
        (">>> only.code()", ""),
    ],
)
def test_only_the_opening_prose_remains(corpus, docstring, prose):
    assert corpus.first_prose(docstring) == prose


def test_near_copies_are_dropped_in_whatever_order_they_come(corpus):
    long = "Return the number of items in the queue, which may be wrong a moment later."
    examples = [
        corpus.Example(long, "concurrency"),
        corpus.Example("Return the number of items in the queue.", "concurrency"),
        corpus.Example(long.upper(), "data_types"),
        corpus.Example("Read one line of the file and leave its end where it was.", "operating_system"),
    ]
    kept = corpus.deduplicate(examples)
    assert kept == corpus.deduplicate(reversed(examples))
    assert len(kept) == 2


@pytest.fixture
def invented(corpus):
    """Six hundred sentences, many of them close to one another."""
    parts = (("Open", "Close", "Read", "Write", "Find"), ("the file", "a socket", "every line", "each part of it"))
    tails = ("and wait until it is done", "unless that was done before", "so that nobody else can ever do so again")
    numbers = range(10)
    texts = (f"{a} {b} {c}, for the case {n} {n * a}." for a, b, c, n in product(*parts, tails, numbers))
    return corpus.deduplicate(corpus.Example(text, "text") for text in texts)


def test_no_test_text_is_a_near_copy_of_a_train_text(corpus, prepare, invented):
    splits = prepare.split_examples(invented)
    assert len(splits["train"]) + len(splits["test"]) == len(invented) < 600
    assert splits["train"]
    assert splits["test"]
    assert all(overlap(corpus, a.text, b.text) <= 0.5 for a, b in product(splits["train"], splits["test"]))


def test_one_text_in_five_is_for_testing(corpus):
    share = sum(corpus.is_test_text(f"Return item number {n} of the list.") for n in range(5000)) / 5000
    assert 0.18 < share < 0.22


def test_the_split_of_a_text_depends_on_its_words_alone(corpus):
    texts = [f"Return item number {n} of the list." for n in range(20)]
    sides = [corpus.is_test_text(text) for text in texts]
    assert sides == [corpus.is_test_text(text.upper().replace(" ", "\n")) for text in texts]
    program = f"import docstring_corpus as c; print([c.is_test_text(text) for text in {texts}])"
    environment = {**os.environ, "PYTHONHASHSEED": "17", "PYTHONPATH": str(SCRIPTS)}
    answer = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
    assert answer.stdout.decode().strip() == str(sides)


def test_files_hold_both_splits_and_the_names_of_the_classes(prepare, corpus, sources, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    examples = corpus.build_corpus(sources)
    prepare.write_splits({"train": examples, "test": examples[:1]}, tmp_path)
    train = pq.read_table(tmp_path / "train.parquet")
    assert train["text"].to_pylist() == [example.text for example in examples]
    assert [list(corpus.CHAPTERS)[label] for label in train["label"].to_pylist()] == [e.chapter for e in examples]
    assert pq.read_table(tmp_path / "test.parquet").num_rows == 1
    assert b'"_type": "ClassLabel"' in train.schema.metadata[b"huggingface"]


def test_weights_with_another_hash_are_refused(prepare, tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"something else")
    with pytest.raises(ValueError, match="SHA-256"):
        prepare.check_weights(weights)
    prepare.check_weights(weights, expected=prepare.sha256_of(weights))


def test_a_missing_model_package_is_named_with_what_to_do(prepare, monkeypatch):
    monkeypatch.setattr(prepare, "MODEL_PACKAGE", "no-such-package")
    with pytest.raises(ModuleNotFoundError, match="no-such-package.*make setup.*Hub id"):
        prepare.find_model()


def test_the_model_is_linked_again_or_copied_where_links_are_not_allowed(prepare, tmp_path, monkeypatch):
    source, target = tmp_path / "package", tmp_path / "models" / "model"
    source.mkdir()
    (source / prepare.WEIGHTS).write_bytes(b"weights")
    for _ in range(2):
        prepare.link_folder(source, target)
        assert target.resolve() == source

    def refuse(self, *args, **kwargs):
        raise OSError("links are not allowed here")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    for _ in range(2):
        prepare.link_folder(source, target)
        assert not target.is_symlink()
        assert (target / prepare.WEIGHTS).read_bytes() == b"weights"

    (target / prepare.WEIGHTS).write_bytes(b"someone's own work")
    with pytest.raises(FileExistsError, match="Move it"):
        prepare.link_folder(source, target)
