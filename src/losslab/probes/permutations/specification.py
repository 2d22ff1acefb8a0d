"""From unified axes to a permutation specification: groups, their names, and which lie within others."""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator

from losslab.probes.permutations.axis_rules import Axes
from losslab.probes.permutations.permutations import Factor, Group, Layout, PermutationSpec, Segment
from losslab.probes.permutations.unification import Axis, atoms, fix


def specification(
    named: dict[str, Axes], seen: list[Axes], outputs: list[Axes | None], unknown: Iterable[str]
) -> PermutationSpec:
    """What can be permuted.

    Args:
        named: The axes of the parameters and running statistics.
        seen: Those of every tensor.
        outputs: Those of what each module call returned.
        unknown: Operations without a rule.
    """
    for axes in named.values():
        fix(*[axis for axis in axes if _segments(axis) is None])  # not to be written as a layout
    names = _names(named)
    owners = _owners(list(names), seen)
    # Outer groups come before those within them.
    numbers = {atom: number for number, atom in enumerate(sorted(names, key=lambda atom: atom in owners))}
    groups = [Group(names[x], x.size, numbers[owners[x]] if x in owners else None) for x in numbers]
    layouts = {name: _layout(axes, numbers) or () for name, axes in named.items()}
    calls = tuple(None if axes is None else _layout(axes, numbers) for axes in outputs)
    return PermutationSpec(tuple(groups), layouts, calls, tuple(unknown))


def _names(named: dict[str, Axes]) -> dict[Axis, str]:
    """The atoms that can be permuted, each by the first place among the parameters that has it."""
    names: dict[Axis, str] = {}
    for name, axes in named.items():
        for dim, axis in enumerate(axes):
            parts = atoms(axis)
            for place, atom in enumerate(parts):
                if not atom.fixed:
                    names.setdefault(atom, f"{name}:{dim}" + (f".{place}" if len(parts) > 1 else ""))
    return names


def _owners(free: list[Axis], seen: Iterable[Axes]) -> dict[Axis, Axis]:
    """Atoms that never occur without another one, and that other: they may move within each of its units.

    The owner must occur elsewhere without them, and nowhere twice in one tensor.
    """
    together: dict[Axis, set[Axis]] = {}
    twice: set[Axis] = set()
    for axes in seen:
        for block in _blocks(axes):
            counts = Counter(atom for atom in block if not atom.fixed)
            for atom in counts:
                together[atom] = together.get(atom, set(counts)) & set(counts)
            twice |= {atom for atom, count in counts.items() if count > 1}
    owners = {atom: [o for o in free if o in together[atom] - twice and atom not in together[o]] for atom in free}
    # One level deep: an owner has none itself.
    first = {atom: next((o for o in found if not owners[o]), None) for atom, found in owners.items()}
    return {atom: owner for atom, owner in first.items() if owner is not None}


def _segments(axis: Axis) -> list[list[Axis]] | None:
    """An axis as a sum of products of atoms; None where it is none."""
    axis = axis.root()
    if axis.kind == "atom":
        return [[axis]]
    parts = [_segments(part) for part in axis.parts]
    if axis.kind == "sum":
        return None if None in parts else [segment for part in parts for segment in part or []]
    first, *others = parts
    if first is None or any(part is None or len(part) > 1 for part in others):
        return None if any(not atom.fixed for atom in atoms(axis)) else [[Axis(axis.size, fixed=True)]]
    return [head + [atom for part in others for atom in (part or [[]])[0]] for head in first]


def _blocks(axes: Axes) -> Iterator[list[Axis]]:
    """The atoms of each rectangular part that is a plain product; each by itself where there are none."""
    segments = [_segments(axis) for axis in axes]
    if any(found is None for found in segments):
        yield from ([atom] for axis in axes for atom in atoms(axis))
        return
    for parts in itertools.product(*(found or [] for found in segments)):
        yield [atom for part in parts for atom in part]


def _layout(axes: Axes, numbers: dict[Axis, int]) -> tuple[Layout, ...] | None:
    """The axes by the groups' numbers; None where one of them is no sum of products."""
    layout = []
    for axis in axes:
        segments = _segments(axis)
        if segments is None:
            return None
        layout.append(tuple(_factors(segment, numbers) for segment in segments))
    return tuple(layout)


def _factors(segment: list[Axis], numbers: dict[Axis, int]) -> Segment:
    """A product by the groups' numbers; neighbours that keep their places are one factor."""
    factors: list[Factor] = []
    for kept, atoms_of in itertools.groupby(segment, lambda atom: atom not in numbers):
        found = [Factor(atom.size, numbers.get(atom)) for atom in atoms_of]
        factors += [Factor(math.prod(factor.size for factor in found))] if kept else found
    return tuple(factors)
