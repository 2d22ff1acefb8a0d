"""Frozen result dataclasses <-> JSON values and NumPy arrays, exactly: the format of a run folder's probe files.

A record is `(values, arrays)`. `values` is a JSON tree that holds every scalar, with non-finite floats as the
strings "NaN", "Infinity", "-Infinity" (JSON has no others); `arrays` holds the NumPy arrays under dotted names.
Neither needs torch, so a report can be made without it.
"""

import dataclasses
import math
import os
import types
import typing
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

Result = TypeVar("Result")
_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def to_record(result: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Split a dataclass into a JSON tree and its arrays; nested dataclasses become nested trees and dotted names.

    The arrays of a tuple of arrays are numbered from 0, as if the numbers were names.
    """
    values: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        if isinstance(value, np.ndarray):
            arrays[field.name] = value
        elif isinstance(value, tuple) and value and all(isinstance(item, np.ndarray) for item in value):
            arrays |= {f"{field.name}.{index}": item for index, item in enumerate(value)}
        elif dataclasses.is_dataclass(value):
            values[field.name], inner = to_record(value)
            arrays |= {f"{field.name}.{key}": array for key, array in inner.items()}
        else:
            values[field.name] = encode(value)
    return values, arrays


def from_record(cls: type[Result], values: dict[str, Any], arrays: dict[str, np.ndarray]) -> Result:
    """Rebuild the dataclass that `to_record` split. Fields that the record lacks take their defaults."""
    hints = typing.get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]  # Result is a dataclass
        nested = _dataclass_in(hints[field.name])
        if field.name in arrays:
            arguments[field.name] = arrays[field.name]
        elif f"{field.name}.0" in arrays and nested is None:  # a tuple of arrays
            count = sum(key.rpartition(".")[0] == field.name for key in arrays)
            arguments[field.name] = tuple(arrays[f"{field.name}.{index}"] for index in range(count))
        elif nested is not None and isinstance(values.get(field.name), dict):
            prefix = field.name + "."
            inner = {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
            arguments[field.name] = from_record(nested, values[field.name], inner)
        elif field.name in values:
            arguments[field.name] = _as_type(hints[field.name], values[field.name])
    return cls(**arguments)


def encode(value: Any) -> Any:
    """A JSON tree for scalars, enums, lists, tuples and dicts; NumPy scalars become Python's."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, dict):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a record holds scalars, lists, dicts and NumPy arrays; got {type(value).__name__}")


def decode(value: Any) -> Any:
    """The inverse of `encode`, up to tuples and enums, which the dataclass's type hints restore."""
    if isinstance(value, str):
        return _NONFINITE.get(value, value)
    if isinstance(value, dict):
        return {key: decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decode(item) for item in value]
    return value


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The members of `X | None`; of a plain hint, itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _dataclass_in(hint: Any) -> type | None:
    return next((item for item in _alternatives(hint) if dataclasses.is_dataclass(item)), None)  # type: ignore[return-value]


def _as_type(hint: Any, value: Any) -> Any:
    kinds = _alternatives(hint)
    if isinstance(value, str) and str in kinds and float not in kinds:
        return value  # a name that happens to be "NaN"
    value = decode(value)
    for item in kinds:
        if isinstance(item, type) and issubclass(item, Enum) and value is not None:
            return item(value)
        if (typing.get_origin(item) or item) is tuple and isinstance(value, list):
            return tuple(value)
    return value


def write_atomically(path: str | Path, content: bytes) -> None:
    """Put `content` at `path` whole or not at all: a temporary file beside it, fsync, rename.

    Raises:
        OSError: It cannot be written, a full disk for one; the path is named, and an older file is still there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = str(path)  # write and fsync name none
        raise
