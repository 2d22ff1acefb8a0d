"""Axes in views and copies: merged, split, put in another order, cut and joined."""

from typing import Any

from losslab.probes.permutations.axis_rules import Axes, Rule, Shapes, broadcast, dims_of, placed, rules
from losslab.probes.permutations.unification import Axis, cut, fix, product, reshape, total

RULES: dict[str, Rule] = {}
_rule = rules(RULES)


@_rule("view", "_unsafe_view", "_reshape_alias")
def _view(a: dict[str, Any], shapes: Shapes) -> list[Axes] | None:
    axes = reshape(a["self"], shapes[0])
    return None if axes is None else [axes]


@_rule("t", "transpose", "permute")
def _permute(a: dict[str, Any], shapes: Shapes) -> list[Axes]:
    axes: Axes = list(a["self"])
    if "dims" in a:
        return [[axes[dim] for dim in a["dims"]]]
    first, second = (a["dim0"], a["dim1"]) if "dim0" in a else (0, len(axes) - 1)
    if axes:
        axes[first], axes[second] = axes[second], axes[first]
    return [axes]


@_rule("unsqueeze")
def _unsqueeze(a: dict[str, Any], shapes: Shapes) -> list[Axes]:
    axes: Axes = list(a["self"])
    axes.insert(a["dim"] % (len(axes) + 1), Axis(1))
    return [axes]


@_rule("squeeze")
def _squeeze(a: dict[str, Any], shapes: Shapes) -> list[Axes]:
    axes = a["self"]
    gone = dims_of(a.get("dim"), len(axes))
    return [[axis for dim, axis in enumerate(axes) if dim not in gone or axis.size != 1]]


@_rule("expand", "repeat")
def _repeat(a: dict[str, Any], shapes: Shapes) -> list[Axes]:
    """Copies are equal, so any order of them is the same."""
    axes = [Axis(1)] * (len(shapes[0]) - len(a["self"])) + a["self"]
    return [[product([Axis(size // axis.size), axis]) for axis, size in zip(axes, shapes[0], strict=True)]]


@_rule("select")
def _select(a: dict[str, Any], shapes: Shapes) -> list[Axes]:
    axes: Axes = list(a["self"])
    fix(axes.pop(a["dim"]))
    return [axes]


@_rule("unbind")
def _unbind(a: dict[str, Any], shapes: Shapes) -> list[Axes]:
    return _select({"self": a["self"], "dim": a["dim"]}, shapes) * len(shapes)


@_rule("slice")
def _slice(a: dict[str, Any], shapes: Shapes) -> list[Axes] | None:
    axes: Axes = list(a["self"])
    dim, size = a["dim"] % len(axes), axes[a["dim"]].size
    start, stop, step = slice(a["start"], a["end"], a["step"]).indices(size)
    piece = cut(axes[dim], start, stop) if step == 1 and start < stop else None
    if piece is None:
        fix(axes[dim])
        piece = placed([shapes[0][dim]])[0]
    axes[dim] = piece
    return [axes]


@_rule("split", "split_with_sizes", "chunk")
def _split_up(a: dict[str, Any], shapes: Shapes) -> list[Axes] | None:
    dim, start, pieces = a["dim"], 0, []
    for shape in shapes:
        bounds = {"self": a["self"], "dim": dim, "start": start, "end": start + shape[dim], "step": 1}
        pieces += _slice(bounds, [shape]) or []
        start += shape[dim]
    return pieces


@_rule("glu")
def _gated(a: dict[str, Any], shapes: Shapes) -> list[Axes] | None:
    halves = _split_up({"self": a["self"], "dim": a["dim"]}, shapes * 2)
    return None if halves is None else [broadcast(halves)]


@_rule("cat")
def _concatenate(a: dict[str, Any], shapes: Shapes) -> list[Axes]:
    tensors = [axes for axes in a["tensors"] if len(axes) == len(shapes[0])]
    dim = a["dim"] % len(shapes[0])
    joined = total([axes[dim] for axes in tensors])
    others = broadcast([[axis if d != dim else Axis(1) for d, axis in enumerate(axes)] for axes in tensors])
    return [[*others[:dim], joined, *others[dim + 1 :]]]


@_rule("stack")
def _stack(a: dict[str, Any], shapes: Shapes) -> list[Axes]:
    axes = broadcast(a["tensors"])
    axes.insert(a["dim"] % len(shapes[0]), Axis(len(a["tensors"]), fixed=True))
    return [axes]


@_rule("constant_pad_nd")
def _pad(a: dict[str, Any], shapes: Shapes) -> list[Axes] | None:
    """Channels of zeros beside an axis's own (the shortcuts of the first ResNets)."""
    axes: Axes = list(a["self"])
    if min(a["pad"]) < 0:
        return None
    for depth in range(len(a["pad"]) // 2):
        before, after = a["pad"][2 * depth : 2 * depth + 2]
        if before or after:
            axes[-depth - 1] = total([Axis(before, fixed=True), axes[-depth - 1], Axis(after, fixed=True)])
    return [axes]
