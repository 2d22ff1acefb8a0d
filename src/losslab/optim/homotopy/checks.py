"""Settings that are out of range are refused in one line: argument, expected, got. Needs no torch."""

import difflib
import math
from numbers import Integral, Real
from types import UnionType


def one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    """Refuse an unknown name, with the nearest that there is."""
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1)
        said = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}{said}")


def number(
    name: str,
    value: object,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
    finite: bool = False,
    words: str = "",
) -> None:
    """Refuse what is no number from `low` to `high`.

    Args:
        name: Of the setting.
        value: What was given.
        low: Least; with `open_low` the number must be above it.
        high: Largest, infinity included unless `finite`.
        open_low: See `low`.
        finite: See `high`.
        words: What else would have been right, as "'adaptive' or ".
    """
    fits = isinstance(value, Real) and not isinstance(value, bool) and low <= float(value) <= high
    if not fits or (open_low and value == low) or (finite and value == math.inf):
        above = f"above {low:g}" if open_low else f"of at least {low:g}"
        below = "" if high == math.inf else f" and at most {high:g}"
        raise ValueError(f"{name}: expected {words}a {'finite ' * finite}number {above}{below}, got {value!r}")


def count(name: str, value: object, least: int, other: str = "") -> None:
    """Refuse what is no int of at least `least`, and not what `other` spells."""
    if other and repr(value) == other:
        return
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected {f'{other} or ' if other else ''}an int of at least {least}, got {value!r}")


def of_kind(name: str, value: object, kind: type | UnionType, *, none: bool = True) -> None:
    """Refuse what is no such object; None is allowed unless `none` says otherwise."""
    if isinstance(value, kind) or (none and value is None):
        return
    kinds: tuple[type, ...] = (kind,) if isinstance(kind, type) else kind.__args__
    names = " or ".join(each.__name__ for each in kinds)
    got = value.__name__ if isinstance(value, type) else type(value).__name__
    raise TypeError(f"{name}: expected {'None or ' if none else ''}a {names}, got {got}")
