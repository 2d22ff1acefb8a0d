"""Which units of a network can change places, how each tensor is made of them, and putting them in another order."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """Units that may change places with each other, in every tensor that has them at once.

    Attributes:
        name: The first parameter that has them and on which axis, as in "0.weight:0"; ".1" for a factor of that axis.
        size: How many units.
        within: The group whose every unit holds such units of its own, which never leave it: attention's heads for
            the coordinates of a head; None for most.
    """

    name: str
    size: int
    within: int | None = None


@dataclass(frozen=True)
class Factor:
    """A part of an axis: the units of a group, or (None) entries that keep their places."""

    size: int
    group: int | None = None


Segment = tuple[Factor, ...]  # a flattened product, outermost first
Layout = tuple[Segment, ...]  # an axis: its segments one after another
Permutations = list[np.ndarray]  # a group: new place -> old one, (size,); within another: (size of that, size)


@dataclass(frozen=True)
class PermutationSpec:
    """The permutations under which a network's function stays the same.

    Attributes:
        groups: What can be permuted.
        layouts: The layout of each axis, by the name of the parameter or running statistic.
        outputs: The same of what each module call returns, in the order in which they end; None of what is no tensor.
        unknown: Operations that are not understood, whose units therefore keep their places: "module (operation)".
    """

    groups: tuple[Group, ...]
    layouts: dict[str, tuple[Layout, ...]]
    outputs: tuple[tuple[Layout, ...] | None, ...] = ()
    unknown: tuple[str, ...] = ()

    def identity(self) -> Permutations:
        """All units in their places."""
        return [np.broadcast_to(np.arange(group.size), self.shape(group)).copy() for group in self.groups]

    def random(self, generator: np.random.Generator) -> Permutations:
        """Every permutation equally likely."""
        return [generator.permuted(order, axis=-1) for order in self.identity()]

    def shape(self, group: Group) -> tuple[int, ...]:
        """The shape of the group's permutation."""
        return (group.size,) if group.within is None else (self.groups[group.within].size, group.size)

    def inner(self, index: int) -> list[int]:
        """The groups within this one."""
        return [i for i, group in enumerate(self.groups) if group.within == index]

    def names(self, index: int) -> list[str]:
        """The tensors that have the group's units."""
        return [name for name, layout in self.layouts.items() if index in groups_of(layout)]

    def apply(
        self, state: Mapping[str, Tensor], permutations: Permutations, names: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """The tensors with their units in the new order; those without a layout as they are."""
        result = dict(state)
        for name in self.layouts if names is None else names:
            if name in state and groups_of(self.layouts[name]):
                result[name] = state[name].clone()
                for block, factors in blocks(result[name], self.layouts[name]):
                    ordered = self._ordered(block.reshape([f.size for f in factors]), factors, permutations)
                    block.copy_(ordered.reshape(block.shape))
        return result

    def _ordered(self, block: Tensor, factors: Segment, permutations: Permutations) -> Tensor:
        """One block, with an axis a factor; groups within others after those, by the order found there."""
        owners = {factor.group: dim for dim, factor in enumerate(factors) if factor.group is not None}
        inside = []
        for dim, factor in enumerate(factors):
            if factor.group is None:
                continue
            order = torch.from_numpy(permutations[factor.group]).to(block.device)
            within = self.groups[factor.group].within
            if within is None:
                block = block.index_select(dim, order)
            else:
                inside.append((dim, owners[within], order))
        for dim, owner, order in inside:
            shape = [1] * block.ndim
            shape[owner], shape[dim] = order.shape
            index = (order if owner < dim else order.T).reshape(shape)
            block = torch.take_along_dim(block, index, dim)
        return block

    def moved(self, permutations: Permutations) -> list[int]:
        """How many units of each group are in another place, or (within another) in another order."""
        return [int((order != plain).sum()) for order, plain in zip(permutations, self.identity(), strict=True)]


def blocks(tensor: Tensor, layout: Sequence[Layout]) -> Iterator[tuple[Tensor, Segment]]:
    """The tensor's rectangular parts that are plain products, as views, each with the factors of its axes in order."""
    bounds = []
    for axis in layout:
        ends = np.cumsum([0, *(math.prod(f.size for f in segment) for segment in axis)]).tolist()
        bounds.append([(slice(*pair), s) for pair, s in zip(itertools.pairwise(ends), axis, strict=True)])
    for parts in itertools.product(*bounds):
        factors = tuple(factor for _, segment in parts for factor in segment)
        yield tensor[tuple(place for place, _ in parts)], factors


def groups_of(layout: Sequence[Layout]) -> set[int]:
    """The groups that occur in a tensor."""
    found = {factor.group for axis in layout for segment in axis for factor in segment}
    return {group for group in found if group is not None}
