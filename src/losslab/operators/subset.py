"""A fixed, seeded subset of the examples, drawn once and held in memory: for data too large for every product."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from losslab.operators import batches as kinds
from losslab.random import make_generator


def draw_subset(
    batches: Iterable[tuple[Any, int]], total: int, max_examples: int, seed: int, first: int = 0
) -> list[Any]:
    """`max_examples` of `total` examples, each with the same chance, in batches about as large as they were.

    Args:
        batches: (batch, its number of examples): this process's share of the data.
        total: Examples over all processes.
        max_examples: How many are drawn of them all.
        seed: The same on every process.
        first: How many examples the processes before this one hold.

    Raises:
        ValueError: A batch has no tensor with its examples on the first axis.
    """
    chosen = torch.randperm(total, generator=make_generator(seed))[:max_examples].sort().values
    subset: list[Any] = []
    pending: list[Any] = []
    size, waiting = 1, 0
    for batch, count in batches:
        size = max(size, count)
        mine = chosen[(chosen >= first) & (chosen < first + count)] - first
        first += count
        if not len(mine):
            continue
        piece = _take(batch, count, mine)
        if pending and (waiting + len(mine) > size or not _fit(pending[-1], piece)):
            subset.append(_joined(pending))
            pending, waiting = [], 0
        pending.append(piece)
        waiting += len(mine)
    return [*subset, _joined(pending)] if pending else subset


def _take(batch: Any, count: int, indices: Tensor) -> Any:
    per_example = kinds.on_first_axis(kinds.tensors_of(batch), count, "max_examples")
    splits = iter(per_example)
    return kinds.map_tensors(batch, lambda t: t[indices.to(t.device)] if next(splits) else t)


def _fit(first: Any, second: Any) -> bool:
    """Whether two batches can be joined: padded sequences of two lengths cannot."""
    pairs = zip(kinds.tensors_of(first), kinds.tensors_of(second), strict=True)
    return all(a.ndim and b.ndim and a.shape[1:] == b.shape[1:] for a, b in pairs)


def _joined(pieces: Sequence[Any]) -> Any:
    if len(pieces) == 1:
        return pieces[0]
    columns = iter([torch.cat(tensors) for tensors in zip(*map(kinds.tensors_of, pieces), strict=True)])
    return kinds.map_tensors(pieces[0], lambda _: next(columns))
