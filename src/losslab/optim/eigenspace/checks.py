"""What a setting must be: the questions, and the one line that says no."""

import difflib
from collections.abc import Iterable
from numbers import Real
from typing import Any


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: what may have been meant."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def is_number(value: Any) -> bool:
    """Whether it is a real number; True and False are not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def rises(pair: Any, top: float) -> bool:
    """Whether it is two numbers, 0 <= low <= high <= top."""
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(map(is_number, pair)):
        return False
    return bool(0 <= pair[0] <= pair[1] <= top)


def require(name: str, value: Any, expected: str, holds: bool) -> None:
    """Refuse a value in a line, unless it holds what is expected.

    Raises:
        ValueError: It does not.
    """
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
