"""The documented functions of the Python standard library: what they are called, what they do, how they are written.

Sources are read, never imported.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from docstring_corpus import CHAPTER_OF, LEFT_OUT, first_prose, is_test_text


@dataclass(frozen=True)
class Definition:
    """A function with a docstring.

    Attributes:
        module: The file it stands in, below the library.
        name: Its name.
        arguments: Names of its arguments.
        prose: The opening prose of its docstring.
        summary: The first sentence of that.
        lines: Lines of code, docstring not included.
        properties: What it does: some of `PROPERTIES`.
    """

    module: str
    name: str
    arguments: tuple[str, ...]
    prose: str
    summary: str
    lines: int
    properties: tuple[str, ...]

    @property
    def header(self) -> str:
        """How it is called."""
        return f"{self.name}({', '.join(self.arguments)})"

    @property
    def is_test(self) -> bool:
        """Whether it belongs to the test split, by its text."""
        return is_test_text(self.prose)


PROPERTIES = {
    "method": lambda node: bool(node.args.args) and node.args.args[0].arg == "self",
    "defaults": lambda node: bool(node.args.defaults or any(node.args.kw_defaults)),
    "returns": lambda node: any(isinstance(part, ast.Return) and part.value is not None for part in ast.walk(node)),
    "raises": lambda node: any(isinstance(part, ast.Raise) for part in ast.walk(node)),
    "loops": lambda node: any(isinstance(part, ast.For | ast.While | ast.comprehension) for part in ast.walk(node)),
}


def library_files() -> list[Path]:
    """Return the source files of the library's modules in a fixed order, without tests."""
    root = Path(sysconfig.get_path("stdlib"))
    return [
        path
        for path in sorted(root.rglob("*.py"))
        if (parts := path.relative_to(root).with_suffix("").parts)[0] in CHAPTER_OF and LEFT_OUT.isdisjoint(parts)
    ]


@cache
def definitions() -> tuple[Definition, ...]:
    """Return the documented public functions of the library in a fixed order, each text once."""
    found: dict[str, Definition] = {}
    root = Path(sysconfig.get_path("stdlib"))
    for path in library_files():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(path.read_bytes(), filename=str(path))
        for node in _functions(tree):
            prose = first_prose(ast.get_docstring(node) or "")
            if len(prose.split()) >= 5:
                found.setdefault(prose, _read(str(path.relative_to(root)), node, prose))
    if not found:
        raise ValueError(f"Found no documented functions in {root}: this Python ships without sources.")
    return tuple(found.values())


def _functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            if not child.name.startswith("_"):
                yield child
        else:
            yield from _functions(child)


def _read(module: str, node: ast.FunctionDef | ast.AsyncFunctionDef, prose: str) -> Definition:
    every = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    body = node.body[1:]
    return Definition(
        module=module,
        name=node.name,
        arguments=tuple(argument.arg for argument in every if argument.arg not in ("self", "cls")),
        prose=prose,
        summary=re.split(r"(?<=[.!?])\s", prose)[0],
        lines=body[-1].end_lineno - body[0].lineno + 1 if body else 1,
        properties=tuple(name for name, holds in PROPERTIES.items() if holds(node)),
    )
