"""What operations have to say about axes: the form of a rule, and what rules share.

A rule gets an operation's arguments by name, with each tensor's axes in its place, and the shapes of the results, and
returns the results' axes; None where the operation does not fit, so that every axis it met must stay in place.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from losslab.probes.permutations.unification import Axis, unify

Axes = list[Axis]
Shapes = list[tuple[int, ...]]
Rule = Callable[[dict[str, Any], Shapes], list[Axes] | None]
Decorated = TypeVar("Decorated", bound=Rule)


def rules(table: dict[str, Rule]) -> Callable[..., Callable[[Decorated], Decorated]]:
    """A decorator that puts a rule into a table under the operations' names."""

    def rule(*names: str) -> Callable[[Decorated], Decorated]:
        def register(function: Decorated) -> Decorated:
            table.update(dict.fromkeys(names, function))
            return function

        return register

    return rule


def placed(shape: Sequence[int]) -> Axes:
    """New axes whose entries keep their places."""
    return [Axis(size, fixed=True) for size in shape]


def broadcast(tensors: Sequence[Axes]) -> Axes:
    """Unify axes from the last on, as broadcasting does."""
    result: Axes = []
    for depth in range(1, max(map(len, tensors), default=0) + 1):
        here = [axes[-depth] for axes in tensors if len(axes) >= depth]
        long = [axis for axis in here if axis.size != 1] or here[:1]
        for axis in long[1:]:
            unify(long[0], axis)
        result.insert(0, long[0])
    return result


def is_axes(value: Any) -> bool:
    """Whether an argument was a tensor."""
    return isinstance(value, list) and all(isinstance(item, Axis) for item in value)


def dims_of(value: Any, ndim: int) -> list[int]:
    """A dim argument as indices from 0; all of them where it is None or empty."""
    if value is None or value == []:
        return list(range(ndim))
    return [dim % ndim for dim in ([value] if isinstance(value, int) else value)] if ndim else []
