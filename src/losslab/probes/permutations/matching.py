"""Permutations that bring one network's weights close to another's (Ainsworth et al. 2023, "Git Re-Basin")."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from losslab.probes.permutations.permutations import Permutations, PermutationSpec, blocks

MAX_SWEEPS = 100
_LEAST_GAIN = 1e-12  # as in the authors' program: below it, rounding could go in circles

State = dict[str, Tensor]


@dataclass
class Similarity:
    """How well each unit of one network fits each of another's, for one group.

    Attributes:
        units: (n, n), summed over what has no units of an inner group.
        inner: For each group within this one, with m units in each of n: (n, m, n, m).
    """

    units: np.ndarray
    inner: dict[int, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Matching:
    """What weight matching found.

    Attributes:
        permutations: Of the best start.
        similarity: ⟨a, πb⟩ at each start and at its end, (starts, 2).
        converged: Whether the best start ended before its sweeps were spent.
    """

    permutations: Permutations
    similarity: np.ndarray
    converged: bool


def match_weights(
    spec: PermutationSpec,
    a: State,
    b: State,
    *,
    starts: int = 1,
    seed: int = 0,
    groups: Sequence[int] | None = None,
    first: Permutations | None = None,
    progress: Callable[[], bool] | None = None,
) -> Matching:
    """Which permutation π makes ⟨a, πb⟩ largest, and so ‖a − πb‖ smallest?  Coordinate ascent; a local optimum.

    One group at a time, in random order, all others held: a linear assignment problem, solved exactly (scipy's
    `linear_sum_assignment`), accepted if it gains more than 1e-12; until no group gains, at most 100 sweeps. A group
    with others within it (attention's heads) is assigned together with the best order inside each pair of its units.
    With one hidden layer the first assignment is the global optimum.

    Args:
        spec: What may be permuted.
        a: Stays as it is; the parameters that count, by name.
        b: The same of what is permuted.
        starts: The first from `first`, the others from random permutations; the best end counts.
        seed: Of the orders and starts.
        groups: Only these; default all.
        first: Where the first start begins; default the identity.
        progress: Called after each start; where it returns False the others are left out.

    Returns:
        Matching. Cost: for each group of n units and sweep about n·P' multiplications, P' the entries that have it,
        and n³ for the assignment.
    """
    generator = np.random.default_rng(seed)
    chosen = list(range(len(spec.groups))) if groups is None else list(groups)
    a, b = ({name: tensor.detach().cpu().double() for name, tensor in state.items()} for state in (a, b))
    best: tuple[_Ascent, bool] | None = None
    similarity = np.empty((starts, 2))
    for start in range(starts):
        begin = (first or spec.identity()) if start == 0 else spec.random(generator)
        ascent = _Ascent(spec, a, b, begin)
        similarity[start, 0] = ascent.similarity()
        converged = ascent.climb(chosen, generator)
        similarity[start, 1] = ascent.similarity()
        if best is None or similarity[start, 1] > similarity[:start, 1].max():
            best = ascent, converged
        if progress is not None and not progress():
            similarity = similarity[: start + 1]
            break
    assert best is not None
    return Matching(best[0].permutations, similarity, best[1])


class _Ascent:
    """One coordinate ascent: `moved` is b in its present order."""

    def __init__(self, spec: PermutationSpec, a: State, b: State, permutations: Permutations):
        self.spec, self.a, self.permutations = spec, a, permutations
        self.moved = spec.apply(b, permutations)

    def similarity(self, names: Sequence[str] | None = None) -> float:
        """⟨a, πb⟩ over some tensors, or all."""
        return sum(float((self.a[name] * self.moved[name]).sum()) for name in (names or self.a))

    def climb(self, groups: list[int], generator: np.random.Generator) -> bool:
        """Whether no group gains any more."""
        for _ in range(MAX_SWEEPS):
            gains = [self._step(int(group)) for group in generator.permutation(groups)]
            if not any(gains):
                return True
        return False

    def _step(self, group: int) -> bool:
        """Assign one group anew; whether that gained."""
        names = [name for name in self.spec.names(group) if name in self.a]
        change = assignment(self.spec, group, self._similarity(group, names))
        before, moved = self.similarity(names), self.moved
        self.moved = self.spec.apply(moved, change, names)
        if self.similarity(names) - before <= _LEAST_GAIN:
            self.moved = moved
            return False
        self.permutations = composed(self.spec, self.permutations, change)
        return True

    def _similarity(self, group: int, names: Sequence[str]) -> Similarity:
        """Between a's units and those of b as they lie now."""
        found = nothing(self.spec, group)
        for name in names:
            pairs = zip(
                blocks(self.a[name], self.spec.layouts[name]),
                blocks(self.moved[name], self.spec.layouts[name]),
                strict=True,
            )
            for (block, factors), (other, _) in pairs:
                sizes, numbers = [f.size for f in factors], [f.group for f in factors]
                for place in (i for i, number in enumerate(numbers) if number == group):
                    add(self.spec, found, numbers, place, block.reshape(sizes), other.reshape(sizes))
        return found


def nothing(spec: PermutationSpec, group: int) -> Similarity:
    """A similarity to add to. Of a group within another it is between units of the same outer unit only."""
    n, within = spec.groups[group].size, spec.groups[group].within
    if within is not None:
        return Similarity(np.zeros((spec.groups[within].size, n, n)))
    sizes = {index: spec.groups[index].size for index in spec.inner(group)}
    return Similarity(np.zeros((n, n)), {index: np.zeros((n, m, n, m)) for index, m in sizes.items()})


def add(
    spec: PermutationSpec,
    found: Similarity,
    numbers: Sequence[int | None],
    place: int,
    block: Tensor,
    other: Tensor,
) -> None:
    """Add the products of one pair of blocks, whose dimension `place` has the group and the others `numbers`."""
    group = numbers[place]
    assert group is not None
    within = spec.groups[group].within
    # The dimension that is looked at together with the group's: its owner's, or one of a group within it.
    partners = [within] if within is not None else spec.inner(group)
    partner = next((dim for dim, number in enumerate(numbers) if number in partners), None)
    lead = (place,) if partner is None else (partner, place) if within is not None else (place, partner)
    x, y = (tensor.movedim(lead, tuple(range(len(lead)))) for tensor in (block, other))
    shape = tuple(x.shape[: len(lead)])
    if within is not None:
        found.units += torch.bmm(x.reshape(*shape, -1), y.reshape(*shape, -1).mT).numpy()
        return
    x, y = x.reshape(math.prod(shape), -1), y.reshape(math.prod(shape), -1)
    products = (x @ y.T).numpy().reshape(*shape, *shape)
    if partner is None:
        found.units += products
    else:
        number = numbers[partner]
        assert number is not None
        found.inner[number] += products


def assignment(spec: PermutationSpec, group: int, found: Similarity) -> Permutations:
    """The best permutation of one group (and of those within it) for a similarity; the others stay."""
    change = spec.identity()
    if spec.groups[group].within is not None:
        change[group] = np.stack([_best(matrix) for matrix in found.units])
        return change
    n = spec.groups[group].size
    units, orders = found.units.copy(), {}
    for index, table in found.inner.items():
        orders[index] = np.empty((n, n, table.shape[1]), dtype=np.int64)
        for i, j in np.ndindex(n, n):
            order = _best(table[i, :, j, :])
            orders[index][i, j] = order
            units[i, j] += table[i, np.arange(len(order)), j, order].sum()
    change[group] = _best(units)
    for index, order in orders.items():
        change[index] = order[np.arange(n), change[group]]
    return change


def _best(matrix: np.ndarray) -> np.ndarray:
    """New place -> old one, with the largest sum; as they are where a NaN leaves none largest."""
    if not np.isfinite(matrix).all():
        return np.arange(len(matrix))
    return linear_sum_assignment(matrix, maximize=True)[1]


def composed(spec: PermutationSpec, first: Permutations, second: Permutations) -> Permutations:
    """One permutation and then another."""
    result = []
    for group, one, two in zip(spec.groups, first, second, strict=True):
        if group.within is None:
            result.append(one[two])
        else:
            result.append(np.take_along_axis(one[second[group.within]], two, axis=1))
    return result
