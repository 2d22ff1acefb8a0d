"""Permutations that bring one network's activations close to another's (Li et al. 2015; Ainsworth et al. 2023)."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from losslab.operators.risk import EmpiricalRisk
from losslab.probes.permutations.matching import Similarity, State, assignment, match_weights, nothing
from losslab.probes.permutations.permutations import Factor, Layout, Permutations, PermutationSpec, blocks, groups_of
from losslab.probes.permutations.tracing import module_calls


def match_activations(
    risk: EmpiricalRisk,
    spec: PermutationSpec,
    a: State,
    b: State,
    *,
    seed: int = 0,
    progress: Callable[[], bool] | None = None,
) -> tuple[Permutations, bool]:
    """Which units of b do what those of a do?  The permutation with the largest sum of correlations, group by group.

    Pearson's correlation over examples and positions, summed over the outputs of all modules that carry the group and
    no other but one within it; units that never change have correlation 0. Each group is one assignment problem,
    whatever the others are. Groups that no module's output shows (inside a function, such as a residual stream that
    only additions form) are matched on the weights, all others held.

    Args:
        risk: Whose data, and the model that both networks are.
        spec: What may be permuted.
        a: Parameters and running statistics by name.
        b: The same of the network that is permuted.
        seed: Of the order of what is matched on the weights.
        progress: Called after each batch; where it returns False the others are left out.

    Returns:
        The permutations, and whether what was matched on the weights converged. Cost: two forward passes, and for
        each group of n units about n² multiplications an example and position.
    """
    a, b = ({name: state[name] for name in spec.layouts} for state in (a, b))
    found = correlations(risk, spec, a, b, progress)
    permutations = spec.identity()
    for group, similarity in found.items():
        change = assignment(spec, group, similarity)
        for index in [group, *similarity.inner]:
            permutations[index] = change[index]
    seen = {index for group, similarity in found.items() for index in (group, *similarity.inner)}
    left = [index for index in range(len(spec.groups)) if index not in seen]
    if not left:
        return permutations, True
    chosen = [{name: state[name] for name in risk.space.names} for state in (a, b)]
    rest = match_weights(spec, *chosen, seed=seed, groups=left, first=permutations)
    return rest.permutations, rest.converged


@torch.no_grad()
def correlations(
    risk: EmpiricalRisk,
    spec: PermutationSpec,
    a: State,
    b: State,
    progress: Callable[[], bool] | None = None,
) -> dict[int, Similarity]:
    """The correlation between each unit of a and each of b, for each group that a module's output shows."""
    moments: dict[tuple[int, int], tuple[tuple[int, ...], Moments]] = {}  # (module call, group)
    with risk.evaluating():
        for batch, _ in risk.read():
            sides = [_activations(risk, spec, state, batch) for state in (a, b)]
            for key, (numbers, first) in sides[0].items():
                sizes = first.shape[:-1]
                _, entry = moments.setdefault(key, (numbers, Moments(sizes.numel(), torch.finfo(risk.dtype).eps)))
                entry.add(*(side[key][1].flatten(0, -2) for side in sides))
            if progress is not None and not progress():
                break
    found: dict[int, Similarity] = {}
    for (_, group), (numbers, entry) in moments.items():
        similarity = found.setdefault(group, nothing(spec, group))
        table = entry.reduced(risk).correlation().numpy()
        if len(numbers) == 1:
            similarity.units += table
        else:
            shape = [spec.groups[index].size for index in numbers]
            similarity.inner[numbers[1]] += table.reshape(*shape, *shape)
    return found


def _activations(
    risk: EmpiricalRisk, spec: PermutationSpec, state: State, batch: object
) -> dict[tuple[int, int], tuple[tuple[int, ...], Tensor]]:
    """By (module call, group): the groups in it, and the units' activations (n, [m of the inner group,] samples)."""
    seen: dict[tuple[int, int], tuple[tuple[int, ...], Tensor]] = {}
    calls = 0

    def left(name: str, output: Tensor) -> None:
        nonlocal calls
        layout, call = spec.outputs[calls], calls
        calls += 1
        fitted = None if layout is None else _fitted(layout, output.shape)
        for part, factors in blocks(output, fitted) if fitted is not None else ():
            places = {f.group: dim for dim, f in enumerate(factors) if f.group is not None}
            numbers = tuple(sorted(places))  # an outer group has the smaller number
            outer = [number for number in numbers if spec.groups[number].within is None]
            if len(outer) != 1 or len(numbers) > 2 or len(places) != sum(f.group is not None for f in factors):
                continue
            values = part.reshape([f.size for f in factors]).double()
            values = values.movedim([places[number] for number in numbers], list(range(len(numbers))))
            seen[call, numbers[0]] = numbers, values.flatten(len(numbers)).cpu()

    with module_calls(risk.model, lambda name: None, left):
        risk.output(state, batch)
    return seen


def _fitted(layout: Sequence[Layout], shape: Sequence[int]) -> list[Layout] | None:
    """The layout for a batch of another size than the traced one: an axis without groups may be of any length."""
    fitted: list[Layout] = []
    for axis, size in zip(layout, shape, strict=True):
        if not groups_of([axis]):
            fitted.append(((Factor(size),),))
        elif sum(math.prod(factor.size for factor in segment) for segment in axis) == size:
            fitted.append(axis)
        else:
            return None
    return fitted


class Moments:
    """Means and (co)variances of two networks' units over a stream of samples, merged batch by batch.

    The update of Chan, Golub & LeVeque (1983): no difference of large numbers, whatever the mean.
    """

    def __init__(self, units: int, eps: float):
        self.count, self.eps = 0, eps
        self.means = torch.zeros(2, units, dtype=torch.float64)
        self.squares = torch.zeros(2, units, dtype=torch.float64)
        self.products = torch.zeros(units, units, dtype=torch.float64)

    def add(self, first: Tensor, second: Tensor) -> None:
        """Samples of both, (units, samples)."""
        values = torch.stack([first, second])
        means = values.mean(-1)
        centred = values - means[..., None]
        self.merge(values.shape[-1], means, (centred**2).sum(-1), centred[0] @ centred[1].T)

    def merge(self, count: int, means: Tensor, squares: Tensor, products: Tensor) -> None:
        """Add what is known of other samples."""
        if not count:
            return
        shift, both = means - self.means, self.count + count
        weight = self.count * count / both
        self.squares += squares + weight * shift**2
        self.products += products + weight * torch.outer(shift[0], shift[1])
        self.means += shift * (count / both)
        self.count = both

    def reduced(self, risk: EmpiricalRisk) -> "Moments":
        """The same over all processes."""
        if risk.ranks.count == 1:
            return self
        count = int(risk.ranks.total(self.count)[0])
        result = Moments(self.means.shape[1], self.eps)
        means = risk.ranks.sum(self.means * self.count) / count
        shift = self.means - means
        result.count, result.means = count, means
        result.squares = risk.ranks.sum(self.squares + self.count * shift**2)
        result.products = risk.ranks.sum(self.products + self.count * torch.outer(shift[0], shift[1]))
        return result

    def correlation(self) -> Tensor:
        """(units of the first, units of the second); 0 where either never changes."""
        # What is constant but for rounding is as dead as what is constant.
        floor = self.count * (8 * self.eps * self.means) ** 2
        dead = self.squares <= floor
        scale = torch.where(dead, 0.0, self.squares.clamp_min(1e-300).rsqrt())
        return scale[0][:, None] * self.products * scale[1][None, :]
