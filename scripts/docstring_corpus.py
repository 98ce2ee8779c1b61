"""Turn a tree of Python sources into labelled texts: the prose of a docstring, and the chapter it belongs to.

Sources are parsed, never imported. Nothing here writes a file or knows Hugging Face, and no result depends on the
order in which a file system or a set lists things: the same sources give the same texts in the same order.
"""

from __future__ import annotations

import ast
import hashlib
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path


# The classes are chapters of the Library Reference as recent versions arrange it, small neighbours together. Modules
# of the chapter "Superseded" stand where their subject is; a module not named here is passed over.
CHAPTERS = {
    # Concurrent execution, networking and interprocess communication.
    "concurrency": (
        "_threading_local asynchat asyncio asyncore concurrent contextvars multiprocessing queue sched selectors "
        "signal socket ssl subprocess threading"
    ),
    # Data types, numeric and mathematical modules, functional programming.
    "data_types": (
        "_collections_abc _pydatetime _pydecimal _strptime _weakrefset array bisect calendar collections copy "
        "datetime decimal enum fractions functools graphlib heapq numbers operator pprint random reprlib statistics "
        "types weakref zoneinfo"
    ),
    # Development tools, debugging and profiling, software packaging and distribution.
    "development": (
        "bdb cProfile distutils doctest ensurepip lib2to3 pdb profile profiling pstats pydoc timeit trace tracemalloc "
        "typing unittest venv zipapp"
    ),
    # Internet data handling, internet protocols and support.
    "internet": (
        "base64 cgi cgitb email ftplib http imaplib ipaddress json mailbox mailcap mimetypes nntplib poplib quopri "
        "smtpd smtplib socketserver telnetlib urllib uuid webbrowser wsgiref xmlrpc"
    ),
    # Files and directories, persistence, compression, operating system services, command lines, Unix.
    "operating_system": (
        "_compression _pyio argparse bz2 cmd compression copyreg ctypes curses dbm filecmp fileinput fnmatch "
        "genericpath getopt getpass glob gzip io linecache logging lzma ntpath optparse os pathlib pickle platform "
        "posixpath pty shelve shlex shutil sqlite3 stat tarfile tempfile tty zipfile"
    ),
    # Python runtime services, importing modules, custom interpreters, language services.
    "runtime": (
        "abc annotationlib ast code codeop compileall contextlib dataclasses dis imp importlib inspect modulefinder "
        "pickletools pkgutil py_compile pyclbr runpy site symtable sysconfig tabnanny token tokenize traceback "
        "warnings zipimport"
    ),
    # Text processing, codecs, file formats, internationalization, structured markup.
    "text": (
        "_markupbase codecs configparser csv difflib encodings gettext html locale netrc plistlib re rlcompleter "
        "string textwrap tomllib xdrlib xml"
    ),
    # Graphical user interfaces with Tk.
    "user_interface": "idlelib tkinter turtle",
}
CHAPTER_OF = {module: chapter for chapter, modules in CHAPTERS.items() for module in modules.split()}

MASK = "<module>"
OTHER_NAMES = {
    "_collections_abc": ("collections",),
    "_pydatetime": ("datetime",),
    "_pydecimal": ("decimal",),
    "_pyio": ("io",),
    "idlelib": ("idle", "tk", "tkinter"),
    "tkinter": ("tcl", "tk", "ttk"),
    "turtle": ("tk", "tkinter"),
}

LEFT_OUT = {"__pycache__", "_bundled", "dist-packages", "idle_test", "lib-dynload", "site-packages", "test", "tests"}
MIN_WORDS, ENOUGH_WORDS = 9, 40

# A role holds backticks, so it comes first.
MARKUP = (
    (re.compile(r":[\w:+.-]+:`[~!]?([^`<]+?)(?:\s*<[^`>]*>)?`"), r"\1"),
    (re.compile(r"`+([^`']*)[`']+_*"), r"\1"),
    (re.compile(r"(?<![\w*])(\*\*?)(?=[^\s*])([^*]*[^*\s])\1(?![\w*])"), r"\2"),
    (re.compile(r"<?\b(?:https?|ftp)://\S+"), ""),
    (re.compile(r"\A[-+*=\s]+\n"), ""),
)
# `name(arguments) -> result`, alone on its line or before a dash or a colon.
SIGNATURE = re.compile(
    r"(?:\([^\n]*\)[ ]=[ ])?[\w.<>]+\([^()]*(?:\([^()]*\)[^()]*)*\)"
    r"(?:\s*->[^\n]*?)?(?:[ ]+--?[ ]+|:[ ]+|[ ]*(?:\n|\Z))"
)
BLOCK_LINE = re.compile(
    r"\s|>>>|\.\.\s|[-*+]\s|@\w|:\w+|[=~^-]{3}"  # deeper text, code, directives, bullets, fields, rules
    r"|\w[^\s.]*\s+--?\s|[a-z_]+:\s|[\w-]+\s=\s"  # `name -- meaning`, `name: meaning`, `name = value`
    r"|[A-Z][\w ()]{,50}::?\s*\Z"  # headings
)
ANNOUNCEMENT = re.compile(r"(?:\A|(?<=\.)\s+)[^.:]{,60}::?\Z")


@dataclass(frozen=True)
class Example:
    """A text and the chapter it comes from."""

    text: str
    chapter: str


def build_corpus(root: Path) -> list[Example]:
    """Read every public docstring below a folder of standard-library sources, each text once.

    Args:
        root: The folder that holds `os.py`, `email/` and the rest.

    Returns:
        The examples, ordered by `text_hash`, which mixes the chapters.

    Raises:
        ValueError: If the folder holds no usable docstring.
    """
    examples = [
        Example(text, CHAPTER_OF[module])
        for module, docstring in read_docstrings(root)
        if len((text := mask_module(first_prose(docstring), module)).split()) >= MIN_WORDS
    ]
    if not examples:
        raise ValueError(
            f"Found no docstrings of the standard library in {root}. Give the folder that holds its `.py` sources; "
            "a Python that ships only compiled files cannot make this data set."
        )
    return deduplicate(examples)


def read_docstrings(root: Path) -> Iterator[tuple[str, str]]:
    """Yield the top-level module and the docstring of each public function, class and method.

    Args:
        root: The folder that holds the modules; those outside `CHAPTERS`, and all tests, are passed over.

    Yields:
        Pairs of module name and docstring, file by file in sorted order.
    """
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] not in CHAPTER_OF or not LEFT_OUT.isdisjoint(parts):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(path.read_bytes(), filename=str(path))
        yield from ((parts[0], docstring) for docstring in public_docstrings(tree))


def public_docstrings(node: ast.AST) -> Iterator[str]:
    """Yield the docstrings of the public definitions in a module or class, but of none inside a function."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from public_docstrings(child)
        elif not child.name.startswith("_"):
            if docstring := ast.get_docstring(child):
                yield docstring
            if isinstance(child, ast.ClassDef):
                yield from public_docstrings(child)


def first_prose(docstring: str) -> str:
    """Take the opening prose of a docstring: its first paragraph, and the next ones while the text is still short.

    Args:
        docstring: A docstring without common indentation.

    Returns:
        One line without markup; empty if the docstring holds only signatures, lists or examples.
    """
    taken: list[str] = []
    for paragraph in re.split(r"\n\s*\n", docstring.strip()):
        prose = prose_of_paragraph(paragraph)
        if prose:
            taken += (prose if prose[-1] in ".:;,!?" else f"{prose}.").split()
        if taken and (not prose or len(taken) >= ENOUGH_WORDS):
            break
    return " ".join(taken)


def prose_of_paragraph(paragraph: str) -> str:
    """Remove markup and call signatures from a paragraph, and cut it where a list or code begins."""
    for pattern, replacement in MARKUP:
        paragraph = pattern.sub(replacement, paragraph)
    while signature := SIGNATURE.match(paragraph):
        paragraph = paragraph[signature.end() :].lstrip()
    prose = "\n".join(takewhile(lambda line: not BLOCK_LINE.match(line), paragraph.splitlines())).strip()
    prose = ANNOUNCEMENT.sub("", prose)
    return prose if len(prose.split()) > 2 else ""


def mask_module(text: str, module: str) -> str:
    """Replace a module's own name, which would give its chapter away, by `MASK`.

    Args:
        text: The text to mask.
        module: A top-level module; upper and lower case count as the same, parts of longer words are left alone.

    Returns:
        The text with every mention replaced.
    """
    names = "|".join(re.escape(name) for name in (module, *OTHER_NAMES.get(module, ())))
    return re.sub(rf"\b(?:{names})\b", MASK, text, flags=re.IGNORECASE)


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation: what makes two texts the same."""
    return re.findall(r"\w+", text.lower())


def text_hash(text: str) -> str:
    """Return the SHA-256 of a text's words, in hexadecimal."""
    return hashlib.sha256(" ".join(words_of(text)).encode()).hexdigest()


def deduplicate(examples: Iterable[Example]) -> list[Example]:
    """Keep one text of each group of near copies, the longest.

    Two texts are near copies if the shorter has more than half of its runs of four words from the longer.

    Args:
        examples: The examples, in any order.

    Returns:
        The examples that remain, ordered by `text_hash`.
    """
    runs_of = {example: runs_of_words(example.text) for example in examples}
    kept: list[Example] = []
    seen: set[tuple[str, ...]] = set()
    for example, runs in sorted(runs_of.items(), key=lambda item: (-len(item[1]), item[0].text, item[0].chapter)):
        if 2 * len(runs & seen) <= len(runs):
            kept.append(example)
            seen |= runs
    return sorted(kept, key=lambda example: text_hash(example.text))


def runs_of_words(text: str, length: int = 4) -> set[tuple[str, ...]]:
    """Return every run of `length` words in a text, or the whole of a text that is shorter."""
    words = words_of(text)
    return {tuple(words[start : start + length]) for start in range(max(1, len(words) - length + 1))}


def is_test_text(text: str) -> bool:
    """Tell whether a text belongs to the test split: one in five, by its hash, in every version of Python."""
    return int(text_hash(text)[:8], 16) % 5 == 0
