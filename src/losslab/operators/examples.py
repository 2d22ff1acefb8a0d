"""The examples of a risk: read many times, in batches, and the same ones on every pass."""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from losslab.operators import batches as kinds
from losslab.operators.subset import draw_subset
from losslab.random import preserved_random_states
from losslab.ranks import Ranks


class Examples:
    """Batches and how many examples they hold.

    Attributes:
        batches: As given.
        num_batches: Those of this process that hold an example.
        own: This process's examples, which every pass must find again.
        total: N, those of all processes.

    Args:
        batches: Anything that can be read many times; this process's own.
        count: batch → its number of examples.
        ranks: The processes that hold a part each.

    Raises:
        TypeError, ValueError: Batches that can be read only once, or no example at all.
    """

    def __init__(self, batches: Iterable[Any], count: Callable[[Any], int], ranks: Ranks):
        kinds.check_reiterable(batches)
        self.batches, self._count, self._ranks = batches, count, ranks
        with preserved_random_states(0, kinds.generators_of(batches)):
            counts = [count for _, count in self._counted()]
        self.own, self.num_batches = sum(counts), len(counts)
        self.total = int(ranks.total(self.own)[0])
        if self.total == 0:
            raise ValueError("batches: expected at least one example, got none; is the loader empty (drop_last)?")

    def read(self, device: torch.device, dtype: torch.dtype | None = None) -> Iterator[tuple[Any, int]]:
        """(batch on the device, its number of examples) for each batch; real numbers in `dtype`, if it is given."""
        total = 0
        for batch, count in self._counted():
            total += count
            yield kinds.to_device(batch, device, dtype), count
        if total != self.own:
            raise ValueError(f"batches: expected the same {self.own} examples on every pass, got {total}")

    def subset(self, max_examples: int, seed: int, *, least_batches: int = 1) -> "Examples":
        """A fixed random part, read once and held on the host; all of them if there are so few."""
        if type(max_examples) is not int or max_examples < 1:
            raise ValueError(f"max_examples: expected a number >= 1 or None, got {max_examples!r}")
        if max_examples >= self.total:
            return self
        before = int(sum(self._ranks.each(self.own)[: self._ranks.rank]))
        with preserved_random_states(0, kinds.generators_of(self.batches)):
            mine = self.read(torch.device("cpu"))
            drawn = draw_subset(mine, self.total, max_examples, seed, before, least_batches=least_batches)
        return Examples(drawn, self._count, self._ranks)

    def held_as(self, batches: Iterable[Any]) -> "Examples":
        """The same examples held otherwise, for example on the device. Nothing is counted anew, on no process."""
        other = copy.copy(self)
        other.batches = batches
        return other

    def _counted(self) -> Iterator[tuple[Any, int]]:
        for batch in self.batches:
            count = int(self._count(batch))
            if count:  # an empty batch adds nothing, and its mean would be NaN
                yield batch, count
