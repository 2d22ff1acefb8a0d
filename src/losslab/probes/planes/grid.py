"""A grid of losses, coarse to fine: what is done survives an interruption, and may be shared among processes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from losslab.probes.partial import PartialFile, checksum
from losslab.ranks import ALONE, Ranks
from losslab.status import Progress, Status, StopRequested

_MOST = 1 << 30  # the stride of a single row: it belongs to every coarser grid


class Grid:
    """`loss(alpha, beta)` at all points of two axes.

    The order is coarse to fine: one row and column in 16, counted from the middle, then one in 8, …, so that a grid
    that was stopped shows the whole area, and row by row within these.

    Args:
        loss: The same bits for the same coordinates, in whatever order it is asked.
        alphas: (A,) columns.
        betas: (B,) rows.
        key: What the losses depend on besides the axes, as a checksum (`checksum`).
        path: A file for what is done so far; one with another key is ignored and replaced.
        progress: Called after each point. If it raises StopRequested the grid ends with what it has.
        ranks: Processes that share the points among them.
        together: Processes that compute each loss together, and so must stop together.

    Attributes:
        losses: (B, A); NaN where the loss is NaN, and where nothing was computed yet.
        done: (B, A) which were computed.
        stopped: Whether it was told to stop before the end.
    """

    def __init__(
        self,
        loss: Callable[[float, float], float],
        alphas: np.ndarray,
        betas: np.ndarray,
        *,
        key: str = "",
        path: str | Path | None = None,
        progress: Progress | None = None,
        ranks: Ranks = ALONE,
        together: Ranks = ALONE,
    ):
        self.loss, self.alphas, self.betas, self.progress = loss, alphas, betas, progress
        self.file = PartialFile(path, checksum(key, alphas, betas))
        self.ranks, self.together, self.stopped = ranks, together, False
        self.losses = np.full((len(betas), len(alphas)), np.nan)
        self.done = np.zeros(self.losses.shape, dtype=bool)
        self.strides = np.minimum.outer(_strides(len(betas)), _strides(len(alphas)))
        rows, columns = np.indices(self.losses.shape)
        order = np.lexsort((columns.ravel(), rows.ravel(), -self.strides.ravel()))
        self._order = [divmod(int(index), len(alphas)) for index in order[ranks.rank :: ranks.count]]
        self._own = np.zeros(self.losses.shape, dtype=bool)
        self._own[tuple(np.array(self._order, dtype=int).reshape(-1, 2).T)] = True

    def evaluate(self) -> Status:
        """Compute what the file does not hold."""
        if stored := self.file.load():
            self.losses, self.done = stored["losses"], stored["done"]
        try:
            for j, i in self._order:
                if self.done[j, i]:
                    continue
                self.losses[j, i] = self.loss(float(self.alphas[i]), float(self.betas[j]))
                self.done[j, i] = True
                if self.together.any(self._told_to_stop(j, i)):
                    self.stopped = not self.done[self._own].all()
                    break
                if self.file.is_due():
                    self._save()
        except BaseException:
            self._save()
            raise
        self._gather()
        if self.stopped:
            self._save()
        else:
            self.file.remove()
        finite = np.isfinite(self.losses[self.done]).all()
        return Status.stopped if self.stopped else Status.complete if finite else Status.nonfinite

    @property
    def stride(self) -> int:
        """One row and column in so many, counted from the middle, is known; 1 where all are."""
        stride, coarsest = 1, int(self.strides.max())
        while stride <= coarsest and not self.done[self.strides >= stride].all():
            stride *= 2
        return stride

    def _told_to_stop(self, j: int, i: int) -> bool:
        if self.progress is None:
            return False
        level = int(self.strides[j, i])
        note = f"one row and column in {level}" if level > 1 else "the whole grid"
        try:
            self.progress(int(self.done[self._own].sum()), len(self._order), note)
        except StopRequested:
            return True
        return False

    def _gather(self) -> None:
        """Put the processes' points together: each is one process's, and zero for the others."""
        if self.ranks.count == 1:
            return
        shape, here = self.losses.shape, self.done & self._own
        losses = self.ranks.total(*np.where(here, self.losses, 0.0).ravel().tolist())
        self.done = np.array(self.ranks.total(*here.ravel().astype(float).tolist())).reshape(shape) > 0
        self.losses = np.where(self.done, np.array(losses).reshape(shape), np.nan)
        self.stopped = self.ranks.any(self.stopped)

    def _save(self) -> None:
        self.file.save({"losses": self.losses, "done": self.done})


def _strides(size: int) -> np.ndarray:
    """For each index the largest power of two that divides its distance from the middle; for the middle, the most."""
    distance = np.abs(np.arange(size) - size // 2)
    most = 1 << max(size // 2, 1).bit_length() - 1
    lowest_bit = distance & -distance
    return np.where(distance == 0, _MOST if size == 1 else most, lowest_bit)
