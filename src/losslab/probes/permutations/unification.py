"""Axes of tensors as types, found by unification: which axes must be permuted together, and which not at all.

An axis is an atom, a product of axes (what flattening (C, H, W) makes, outermost first) or a sum of axes (what
concatenation makes). Two axes that an operation matches entry by entry are unified, as types are in type inference
(Robinson 1965): an atom becomes the other, products and sums are matched piece by piece, and atoms are split where the
other side has a boundary. What cannot be matched is fixed: its entries keep their places, which is always right.
"""

import math
from collections.abc import Sequence
from typing import Literal

Kind = Literal["atom", "product", "sum"]


class Axis:
    """A node of the union-find. `parts` are a product's factors or a sum's terms; only atoms carry `fixed`."""

    def __init__(self, size: int, fixed: bool = False, kind: Kind = "atom", parts: Sequence["Axis"] = ()):
        self.size, self.fixed, self.kind, self.parts = size, fixed, kind, list(parts)
        self._same: Axis | None = None

    def root(self) -> "Axis":
        """The node that stands for all that were unified with this one."""
        node = self
        while node._same is not None:
            node = node._same
        if node is not self:
            self._same = node
        return node

    def become(self, other: "Axis") -> None:
        """An atom is from now on the other axis."""
        self._same = other
        if self.fixed:
            fix(other)


def atoms(axis: Axis) -> list[Axis]:
    """The atoms that an axis is made of, those of one entry left out."""
    axis = axis.root()
    if axis.kind == "atom":
        return [axis] if axis.size > 1 else []
    return [atom for part in axis.parts for atom in atoms(part)]


def fix(*axes: Axis) -> None:
    """Their entries keep their places."""
    for axis in axes:
        for atom in atoms(axis):
            atom.fixed = True


def product(factors: Sequence[Axis]) -> Axis:
    """The axis that flattening these makes."""
    factors = [factor for factor in factors if factor.size != 1]
    if len(factors) == 1:
        return factors[0]
    return Axis(math.prod(f.size for f in factors), kind="product", parts=factors) if factors else Axis(1)


def total(terms: Sequence[Axis]) -> Axis:
    """The axis that concatenating these makes."""
    terms = [term for term in terms if term.size]
    return terms[0] if len(terms) == 1 else Axis(sum(t.size for t in terms), kind="sum", parts=terms)


def unify(first: Axis, second: Axis) -> None:
    """Entry i of one belongs to entry i of the other, from now on in every permutation."""
    first, second = first.root(), second.root()
    if first is second:
        return
    if second.kind == "atom":
        first, second = second, first
    if first.kind == "atom":
        first.become(second)
    elif first.kind == second.kind:
        _match(first.kind, first, second)
    else:
        fix(first, second)


def _match(kind: Kind, first: Axis, second: Axis) -> None:
    """Unify two products or two sums piece by piece, splitting atoms where the other side has a boundary."""
    ours, theirs = [first], [second]
    while ours and theirs:
        x, y = _pop(ours, kind), _pop(theirs, kind)
        if x is not y and x.size != y.size:
            small = min(x.size, y.size)
            pieces = [_pieces(kind, axis, small) for axis in (x, y)]
            if not all(pieces):
                fix(x, y, *ours, *theirs)
                return
            (x, *rest_x), (y, *rest_y) = pieces
            ours, theirs = ours + rest_x, theirs + rest_y
        unify(x, y)


def _pop(stack: list[Axis], kind: Kind) -> Axis:
    """Take the first piece off a stack of axes (its top is first), opening those of this kind."""
    axis = stack.pop().root()
    while axis.kind == kind:
        stack.extend(reversed(axis.parts))
        axis = stack.pop().root()
    return axis


def _pieces(kind: Kind, axis: Axis, size: int) -> list[Axis]:
    """The axis as a first piece of this size and the rest; empty where it can have no boundary there.

    An atom is split for good, wherever it occurs.
    """
    if axis.size == size:
        return [axis]
    if axis.kind != "atom" or (kind == "product" and axis.size % size):
        return []
    rest = axis.size // size if kind == "product" else axis.size - size
    axis.kind, axis.parts = kind, [Axis(size, axis.fixed), Axis(rest, axis.fixed)]
    return list(axis.parts)


def reshape(axes: Sequence[Axis], shape: Sequence[int]) -> list[Axis] | None:
    """The axes after a reshape; None where it does not respect the boundaries of what is permuted."""
    stack, result = list(reversed(axes)), []
    if math.prod(shape) != math.prod(axis.size for axis in axes) or not math.prod(shape):
        return None
    for size in shape:
        factors: list[Axis] = []
        missing = size
        while missing > 1:
            factor, *rest = _pieces_of(_pop(stack, "product"), missing)
            if missing % factor.size:
                return None
            stack.extend(rest)
            factors.append(factor)
            missing //= factor.size
        result.append(product(factors))
    return result


def _pieces_of(factor: Axis, missing: int) -> list[Axis]:
    """The factor, split where it is larger than what is missing and can be."""
    return (_pieces("product", factor, missing) if factor.size > missing else []) or [factor]


def cut(axis: Axis, start: int, stop: int) -> Axis | None:
    """Entries start … stop − 1 of an axis; None where it can have no boundary there."""
    terms: list[Axis] = []
    stack, position = [axis], 0
    while position < stop:
        term = _pop(stack, "sum")
        end = position + term.size
        if position < start < end or end > stop:
            pieces = _pieces("sum", term, (start if position < start else stop) - position)
            if not pieces:
                return None
            stack.extend(reversed(pieces))
            continue
        if position >= start:
            terms.append(term)
        position = end
    return total(terms)
