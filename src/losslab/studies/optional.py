"""Packages that losslab can do without, imported where they are needed; a missing one is one clear line."""

import importlib
import types


def optional(module: str, install: str) -> types.ModuleType:
    """The module.

    Args:
        module: Its dotted name; its last package's missing is what is told.
        install: What pip is to be told: a package, or "losslab[extra]".

    Raises:
        ValueError: Its package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        what = f"'{install}'" if "[" in install else install  # brackets are the shell's
        missing = (error.name or module).partition(".")[0]
        raise ValueError(f"{missing}: expected it installed, got no such package; pip install {what}") from None
