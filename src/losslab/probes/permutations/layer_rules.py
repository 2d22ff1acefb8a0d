"""Axes in arithmetic: entry by entry, products, reductions, layers."""

import re
from typing import Any

from losslab.probes.permutations.axis_rules import Axes, Rule, Shapes, broadcast, dims_of, is_axes, placed, rules
from losslab.probes.permutations.unification import Axis, fix, product, reshape, unify

RULES: dict[str, Rule] = {}
_rule = rules(RULES)


@_rule("copy", "_prelu_kernel", "where", "masked_fill", "lerp")
def pointwise(a: dict[str, Any], shapes: Shapes) -> list[Axes]:
    """Entry by entry, broadcast."""
    return [broadcast([value for value in a.values() if is_axes(value) and value])]


@_rule("detach", "alias", "lift_fresh", "_to_copy", "clone", "contiguous", "fill", "zero", "empty_like")
def _same(a: dict[str, Any], shapes: Shapes) -> list[Axes]:
    return [next(iter(a.values()))]


@_rule("zeros", "ones", "full", "empty", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full")
def _constant(a: dict[str, Any], shapes: Shapes) -> list[Axes]:
    """Equal entries: the same in any order."""
    return [[Axis(size) for size in shapes[0]]]


# -- sums of products ---------------------------------------------------------------------------------------------


@_rule("mm", "bmm", "mv", "dot")
def _product(a: dict[str, Any], shapes: Shapes) -> list[Axes]:
    left, right = [value for value in a.values() if is_axes(value)][:2]
    batch = [broadcast([[x], [y]])[0] for x, y in zip(left[:1], right[:1], strict=True)] if len(left) == 3 else []
    columns = right[len(batch) :]
    unify(left[-1], columns[0])
    return [batch + left[len(batch) : -1] + columns[1:]]


@_rule("addmm", "baddbmm", "addmv")
def _product_and_sum(a: dict[str, Any], shapes: Shapes) -> list[Axes]:
    added, left, right = [value for value in a.values() if is_axes(value)][:3]
    return [broadcast([*_product({"left": left, "right": right}, shapes), added])]


@_rule("convolution")
def _convolution(a: dict[str, Any], shapes: Shapes) -> list[Axes] | None:
    inputs, weight, groups = a["input"], a["weight"], a["groups"]
    fix(*inputs[2:], *weight[2:])
    group: Axes = []
    channels, (first, second) = inputs[1], weight[:2]
    fan_in = first if a["transposed"] else second
    if groups > 1:
        blocks = _split(channels, groups), _split(first, groups)
        if not all(blocks):
            return None
        (outer, channels), (other, inner) = blocks
        unify(outer, other)
        group, first = [outer], inner
        fan_in = inner if a["transposed"] else second
    unify(channels, fan_in)
    outputs = product([*group, second if a["transposed"] else first])
    if a["bias"]:
        unify(a["bias"][0], outputs)
    return [[inputs[0], outputs, *placed(shapes[0][2:])]]


def _split(axis: Axis, outer: int) -> Axes:
    return reshape([axis], (outer, axis.size // outer)) or []


# -- reductions ---------------------------------------------------------------------------------------------------


@_rule("sum", "mean", "amax", "amin", "prod", "nansum", "var", "std", "var_mean", "std_mean", "logsumexp", "any", "all")
def _reduction(a: dict[str, Any], shapes: Shapes) -> list[Axes]:
    axes = next(iter(a.values()))
    gone = dims_of(a.get("dim"), len(axes))
    kept = [axis for dim, axis in enumerate(axes) if dim not in gone]
    if a.get("keepdim"):
        kept = [Axis(1) if dim in gone else axis for dim, axis in enumerate(axes)]
    return [kept] * len(shapes)


@_rule("norm", "linalg_vector_norm")
def _norm(a: dict[str, Any], shapes: Shapes) -> list[Axes]:
    return _reduction({"self": a["self"], "dim": a.get("dim"), "keepdim": a.get("keepdim")}, shapes)


@_rule("max", "min", "argmax", "argmin")
def _place_of_largest(a: dict[str, Any], shapes: Shapes) -> list[Axes]:
    """Results that say where the largest is, and so need the axis in place; `max` and `min` of two are pointwise."""
    axes = next(iter(a.values()))
    if is_axes(a.get("other")):
        return pointwise(a, shapes)
    fix(*[axes[dim] for dim in dims_of(a.get("dim"), len(axes))])
    return _reduction(a, shapes)


@_rule("_softmax", "_log_softmax", "_safe_softmax")
def _softmax(a: dict[str, Any], shapes: Shapes) -> list[Axes]:
    """The sums over the axis are a result too: entries that share one must stay together."""
    return [a["self"], *_reduction({"self": a["self"], "dim": a["dim"]}, shapes[:1])]


@_rule("cumsum", "flip", "roll", "sort", "topk", "cumprod")
def _along(a: dict[str, Any], shapes: Shapes) -> list[Axes]:
    """Operations on an axis's order."""
    axes = a["self"]
    moved = dims_of(a.get("dims", a.get("dim")), len(axes))
    fix(*[axes[dim] for dim in moved])
    return [[placed([shape[d]])[0] if d in moved else x for d, x in enumerate(axes)] for shape in shapes]


# -- layers -------------------------------------------------------------------------------------------------------


@_rule(
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
    "_batch_norm_with_update", "miopen_batch_norm",
)  # fmt: skip
def _batch_norm(a: dict[str, Any], shapes: Shapes) -> list[Axes]:
    inputs = a["input"]
    for name in ("weight", "bias", "running_mean", "running_var"):
        if a.get(name):
            unify(inputs[1], a[name][0])
    statistics = [[inputs[1]] if shape == (inputs[1].size,) else placed(shape) for shape in shapes[1:]]
    return [inputs, *statistics]


@_rule("native_layer_norm", "_fused_rms_norm")
def _layer_norm(a: dict[str, Any], shapes: Shapes) -> list[Axes]:
    inputs, count = a["input"], len(a["normalized_shape"])
    for name in ("weight", "bias"):
        if a.get(name):
            broadcast([inputs, a[name]])
    statistics = [*inputs[:-count], *[Axis(1)] * count]
    return [inputs, *[statistics] * (len(shapes) - 1)]


@_rule("native_group_norm")
def _group_norm(a: dict[str, Any], shapes: Shapes) -> list[Axes] | None:
    inputs, groups = a["input"], a["group"]
    blocks = reshape([inputs[1]], (groups, inputs[1].size // groups))
    if blocks is None:
        return None
    for name in ("weight", "bias"):
        if a.get(name):
            unify(inputs[1], a[name][0])
    return [inputs, *[[inputs[0], blocks[0]]] * (len(shapes) - 1)]


@_rule("embedding")
def _embedding(a: dict[str, Any], shapes: Shapes) -> list[Axes]:
    """Which row is taken is data."""
    fix(a["weight"][0], *a["indices"])
    return [[*a["indices"], a["weight"][1]]]


def _spatial(count: int) -> Rule:
    def rule(a: dict[str, Any], shapes: Shapes) -> list[Axes]:
        inputs = next(iter(a.values()))
        fix(*inputs[-count:])
        return [[*inputs[:-count], *placed(shape[-count:])] for shape in shapes]

    return rule


for _name in (
    "max_pool1d", "max_pool1d_with_indices", "max_pool2d", "max_pool2d_with_indices", "max_pool3d_with_indices",
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d",
    "adaptive_max_pool2d", "adaptive_max_pool3d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
    "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "reflection_pad1d", "reflection_pad2d",
    "replication_pad1d", "replication_pad2d",
):  # fmt: skip
    RULES[_name] = _spatial(int(re.findall(r"(\d)d", _name)[0]))
