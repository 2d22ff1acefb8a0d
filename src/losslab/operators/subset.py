"""A fixed, seeded subset of the examples, drawn once and held in memory: for data too large for every product."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from losslab.operators import batches as kinds
from losslab.random import make_generator


def draw_subset(
    batches: Iterable[tuple[Any, int]],
    total: int,
    max_examples: int,
    seed: int,
    first: int = 0,
    *,
    least_batches: int = 1,
) -> list[Any]:
    """`max_examples` of `total` examples, each with the same chance, in batches at most as large as they were.

    Args:
        batches: (batch, its number of examples): this process's share of the data.
        total: Examples over all processes.
        max_examples: How many are drawn of them all.
        seed: The same on every process.
        first: How many examples the processes before this one hold.
        least_batches: Batches to make of them all, if there are so many examples.

    Raises:
        ValueError: A batch has no tensor with its examples on the first axis.
    """
    chosen = torch.randperm(total, generator=make_generator(seed))[:max_examples].sort().values
    subset: list[Any] = []
    pending: list[Any] = []
    most, size, waiting = max(1, max_examples // least_batches), 1, 0
    for batch, count in batches:
        size = min(max(size, count), most)
        mine = chosen[(chosen >= first) & (chosen < first + count)] - first
        first += count
        for rows in mine.split(size) if len(mine) else ():
            piece = kinds.rows_of(batch, count, rows, "max_examples")
            if pending and (waiting + len(rows) > size or not _fit(pending[-1], piece)):
                subset.append(_joined(pending))
                pending, waiting = [], 0
            pending.append(piece)
            waiting += len(rows)
    return [*subset, _joined(pending)] if pending else subset


def _fit(first: Any, second: Any) -> bool:
    """Whether two batches can be joined: padded sequences of two lengths cannot."""
    pairs = zip(kinds.tensors_of(first), kinds.tensors_of(second), strict=True)
    return all(a.ndim and b.ndim and a.shape[1:] == b.shape[1:] for a, b in pairs)


def _joined(pieces: Sequence[Any]) -> Any:
    if len(pieces) == 1:
        return pieces[0]
    columns = iter([torch.cat(tensors) for tensors in zip(*map(kinds.tensors_of, pieces), strict=True)])
    return kinds.map_tensors(pieces[0], lambda _: next(columns))
