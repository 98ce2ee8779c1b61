"""Libraries that only some users need: imported where they are used, with the way to get them where they lack."""

from __future__ import annotations

import importlib
from types import ModuleType

from hf_blocklocal.errors import MissingExtraError


def optional(module: str, *, extra: str) -> ModuleType:
    """Import a module of a library that comes with an extra of this package.

    Args:
        module: Dotted name of the module.
        extra: The extra that installs it.

    Raises:
        MissingExtraError: If the library is not installed.
    """
    library = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        raise MissingExtraError(
            f"This needs {library}, which is not installed. Run: pip install 'hf-blocklocal[{extra}]'"
        ) from error
