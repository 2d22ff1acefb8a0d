"""What a setting names as module:path.to.name: code of the user's own. Needs no torch."""

import importlib
import os
import sys
from typing import Any

from losslab.studies.section import suggestion


def imported(name: str, *, setting: str, kind: str) -> Any:
    """What stands at module:path.to.name.

    Modules are looked for where Python does, and in the present folder.

    Args:
        name: As in the configuration.
        setting: Whose value it is, such as "model.name": opens the error lines.
        kind: What is expected there, such as "function": the last word of the form in the error line.

    Raises:
        ValueError: Another form, no such module, no such name in it, or a module that cannot be imported.
    """
    dotted = name.partition(":")[2]
    path, dot, last = dotted.rpartition(".")
    if not dot or not all(part.isidentifier() for part in dotted.split(".")):
        raise ValueError(f"{setting}: expected module:path.to.{kind}, got {name!r}")
    module = _module(path, setting=setting, wanted=dotted)
    try:
        return getattr(module, last)
    except AttributeError:
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        advice = suggestion(last, known) if known else "and nothing else to call"
        raise ValueError(f"{setting}: {path} has no {last!r}, {advice}") from None


def _module(path: str, *, setting: str, wanted: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # as `python -m` does; it stays, for what the module imports later
    try:
        return importlib.import_module(path)
    except Exception as error:  # whatever a user's module raises while it is read
        if isinstance(error, ModuleNotFoundError) and error.name and f"{path}.".startswith(f"{error.name}."):
            raise ValueError(f"{setting}: no module {error.name!r} here or on PYTHONPATH, for {wanted}") from None
        raise ValueError(f"{setting}: {path} cannot be imported: {' '.join(str(error).split())}") from error
