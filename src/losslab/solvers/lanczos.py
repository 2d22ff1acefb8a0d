"""Eigenpairs by thick-restart Lanczos, stopped on residuals."""

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from losslab.operators.base import LinearOperator, require_operator
from losslab.random import gaussian, make_generator
from losslab.solvers.block_krylov import BlockKrylov
from losslab.solvers.budget import Budget
from losslab.solvers.estimate import Eigenpairs
from losslab.solvers.krylov import Krylov, basis_dtype
from losslab.status import Progress, Status

Which = Literal["largest_magnitude", "largest", "smallest", "both_ends"]

# What makes a Ritz value wanted: large keys come first.
_KEYS: dict[str, list[Callable[[np.ndarray], np.ndarray]]] = {
    "largest_magnitude": [np.abs],
    "largest": [np.positive],
    "smallest": [np.negative],
    "both_ends": [np.positive, np.negative],
}


def eigenpairs(
    operator: LinearOperator,
    k: int = 1,
    *,
    which: Which = "largest_magnitude",
    tol: float = 1e-3,
    block_size: int = 1,
    max_basis: int | None = None,
    max_matvecs: int | None = None,
    time_budget: float | None = None,
    vectors: bool = True,
    seed: int | torch.Generator = 0,
    start: Tensor | None = None,
    progress: Progress | None = None,
) -> Eigenpairs:
    """Which are the k outermost eigenvalues of A, and how well are they known?

    Thick-restart Lanczos (Wu & Simon 2000) with full reorthogonalisation; a pair has converged when its residual bound
    |β s_mi| ≤ tol·|θ_i|. An invariant subspace met on the way is searched on from a new random vector, so that
    multiple eigenvalues of exactly structured matrices are found as often as they occur.

    With `block_size` p the p products of a step share one pass over the data (`matmat`), which pays where a pass costs
    more than a product: batches that are read or whose graphs are built each time. A cluster of up to p equal
    eigenvalues is then found in any matrix; one vector meets the second copy only through rounding, and may stop
    before. Fewer passes take more products: reach for it where passes are what costs, or clusters are expected.

    Args:
        operator: Symmetric n×n.
        k: How many, 1 ≤ k ≤ n; with "both_ends" k at each end (2k ≤ n).
        which: "largest_magnitude", "largest", "smallest" (algebraically), or "both_ends" (the largest, then the
            smallest).
        tol: Relative residual to stop at.
        block_size: p, vectors that are multiplied at once.
        max_basis: Vectors kept at most, at least k + 2p; default 2k + max(20, 10p), or 40 if that is less. Memory
            max_basis × n numbers: `losslab.solvers.krylov.basis_bytes(A, max_basis)` tells it before, and what does not
            fit into the free memory is refused before the first product.
        max_matvecs: Products at most; default 20·max_basis.
        time_budget: Seconds at most.
        vectors: Whether to return the eigenvectors.
        seed: Of the start vector; or a generator.
        start: A start vector of one's own, for example from a run nearby; up to p columns (n, j) for a block. Random
            vectors complete a block. Moved to the operator's device.
        progress: Called after each product, or block of them.

    Returns:
        Eigenpairs, sorted as asked; `status` says whether all converged. Cost: `matvecs` products. A pair that the
        budget was too small to meet at all is NaN with an infinite error.

    Raises:
        ValueError: k, tol, which, block_size, max_basis or max_matvecs out of range; a start vector of another shape,
            zero, or not finite; an operator that is not symmetric.
        TypeError: Something that is no LinearOperator, or a start that is no real tensor.
        MemoryError: A basis larger than the free memory.
    """
    wanted = _check(operator, k, which, tol, block_size, max_basis)
    max_basis = min(max_basis or max(2 * wanted + max(20, 10 * block_size), 40), operator.size)
    max_matvecs = 20 * max_basis if max_matvecs is None else max_matvecs
    if max_matvecs < block_size:
        raise ValueError(f"max_matvecs: expected at least 1, and a block of {block_size}, got {max_matvecs}")
    generator = make_generator(seed)
    starts = _starts(operator, start, block_size, generator)
    krylov = Krylov(operator, starts[0], max_basis) if block_size == 1 else BlockKrylov(operator, starts, max_basis)
    search = Search(krylov, k, which, tol)
    budget = Budget(max_matvecs, time_budget, progress, ranks=operator.split.ranks)
    status = run(search, search.found, budget, generator)
    return search.result(status, vectors, seed if isinstance(seed, int) else None)


def run(search: "Search", finished: Callable[[], bool], budget: Budget, generator: torch.Generator) -> Status:
    """Extend the Krylov space, restarting when it is full, until `finished`, the budget, or nothing is left."""
    krylov = search.krylov
    while (over := budget.stop()) is None:
        if krylov.full:
            search.compress()
        if not krylov.new_block(generator):
            return Status.breakdown
        if budget.left < krylov.width:
            return Status.budget_reached
        before = krylov.matvecs
        krylov.step()
        budget.spend(krylov.matvecs - before, search.note)
        if not krylov.finite:
            return Status.nonfinite
        if finished():
            return Status.breakdown if krylov.broken else Status.converged
    return over


class Search:
    """Which Ritz pairs of a Krylov space are wanted, and have they converged?

    A pair has converged when its residual is at most tol·|θ|, or at most floor·‖A‖.
    """

    def __init__(self, krylov: Krylov, k: int, which: Which, tol: float, floor: float = 0.0):
        self.krylov, self.k, self.tol, self.floor = krylov, k, tol, floor
        self.keys = _KEYS[which]

    def selection(self, values: np.ndarray, extra: int = 0) -> np.ndarray:
        """Indices of the k wanted Ritz values (`extra` more at each end that is wanted), best first."""
        chosen: list[int] = []
        for key in self.keys:  # an end takes what the one before has left, also where all values are equal
            order = np.argsort(-key(values), kind="stable").tolist()
            chosen += [i for i in order if i not in chosen][: self.k + extra]
        return np.array(chosen, dtype=int)

    def found(self) -> bool:
        """Whether every wanted pair has converged, and nothing better can hide behind an invariant subspace."""
        krylov = self.krylov
        values, residuals, _ = krylov.ritz()
        chosen = self.selection(values)
        if len(chosen) < self.k * len(self.keys) or not self._converged(values, residuals)[chosen].all():
            return krylov.size == krylov.operator.size
        return not krylov.had_break or krylov.size == krylov.operator.size or self._block_adds_nothing()

    def compress(self) -> None:
        """Thick restart: keep the wanted pairs, and as many of the next ones as leave the space half empty."""
        krylov = self.krylov
        values, _, vectors = krylov.ritz()
        # Two steps at least must be left to grow by.
        room = min(max(krylov.capacity // 2, self.k * len(self.keys) + 1), krylov.capacity - 2 * krylov.width)
        keep = self.selection(values, max(room // len(self.keys) - self.k, 0))
        krylov.restart(np.sort(keep), values, vectors)

    def result(self, status: Status, vectors: bool, seed: int | None) -> Eigenpairs:
        """The wanted pairs as they are now; NaN for those that the space is still too small to hold."""
        krylov = self.krylov
        values, residuals, columns = krylov.ritz()
        chosen = self.selection(values)
        missing = self.k * len(self.keys) - len(chosen)
        # Each restart rounds the basis once more (float64, 7 restarts: 24 eps‖A‖).
        norm = max(krylov.norm, np.abs(values).max(initial=0.0))
        rounding = krylov.rounding * norm * max(1.0, krylov.matvecs / krylov.capacity)

        def padded(array: np.ndarray, fill: float | bool) -> np.ndarray:
            return np.append(array[chosen], np.full(missing, fill, dtype=array.dtype))

        return Eigenpairs(
            values=padded(values, np.nan),
            residuals=padded(residuals, np.inf),
            errors=padded(residuals + rounding, np.inf),
            converged=padded(self._converged(values, residuals), False),
            vectors=pad(krylov.ritz_vectors(columns[:, chosen]), (0, missing), value=np.nan) if vectors else None,
            matvecs=krylov.matvecs,
            status=status,
            basis_bytes=krylov.basis.numel() * krylov.basis.element_size(),
            seed=seed,
        )

    def note(self) -> str:
        """The present Ritz values and residuals, for a progress bar."""
        values, residuals, _ = self.krylov.ritz()
        return " ".join(f"{values[i]:.4g}±{residuals[i]:.0e}" for i in self.selection(values)[:5])

    def _converged(self, values: np.ndarray, residuals: np.ndarray, largest: float | None = None) -> np.ndarray:
        # Below the rounding of ‖A‖ a residual cannot fall: an eigenvalue of zero has converged there.
        largest = np.abs(values).max(initial=0.0) if largest is None else largest
        floor = max(1e2 * torch.finfo(self.krylov.basis.dtype).eps, self.floor) * largest
        return residuals <= np.maximum(self.tol * np.abs(values), floor)

    def _block_adds_nothing(self) -> bool:
        """After a breakdown T is block-diagonal and the newest block searches the complement of the others.

        Its outermost value, once converged, bounds what the complement holds: if it is not better than the k-th wanted
        one, no further copy of a multiple eigenvalue is missing. A block that goes on, and found nothing twice, need
        not come to that: it is a Lanczos run like one that never met a breakdown (say, from an eigenvector).
        """
        krylov = self.krylov
        values, _, _ = krylov.ritz()
        # Its own: the eigenvectors of the whole T mix copies of an eigenvalue that several blocks have found.
        newest, residuals, _ = krylov.ritz(krylov.block_start)
        if not len(newest) or (krylov.lost and not krylov.broken):  # a block lost some directions: the others go on
            return False
        largest = np.abs(values).max()
        slack = 1e-6 * largest
        converged = self._converged(newest, residuals, largest)

        def near(among: np.ndarray) -> np.ndarray:
            return (np.abs(among[:, None] - newest) <= slack + residuals).sum(axis=0)

        copies = near(values) > near(newest)  # of what other blocks have found, as far as is known
        for key in self.keys:
            last_wanted = np.sort(key(values))[::-1][self.k - 1]
            better = key(newest) > last_wanted + slack
            if not converged[np.argmax(key(newest))] or (better & (copies | krylov.broken)).any():
                return False
        return True


def _check(operator: LinearOperator, k: int, which: str, tol: float, block_size: int, max_basis: int | None) -> int:
    """Refuse what cannot be computed; returns the number of pairs wanted in all."""
    require_operator(operator)
    if which not in get_args(Which):
        raise ValueError(f"which: expected one of {', '.join(get_args(Which))}; got {which!r}")
    size, ends = operator.size, len(_KEYS[which])
    if type(k) is not int or not 1 <= k <= size // ends:
        raise ValueError(f"k: expected 1 <= k <= {size // ends} for an operator of size {size}, got {k!r}")
    if not isinstance(tol, int | float) or not tol > 0:
        raise ValueError(f"tol: expected a number > 0, got {tol!r}")
    if type(block_size) is not int or not 1 <= block_size <= size:
        raise ValueError(f"block_size: expected 1 <= block_size <= {size}, got {block_size!r}")
    least = ends * k + 2 * block_size
    if max_basis is not None and max_basis < min(least, size):
        pairs = "k" if ends == 1 else f"{ends}k"
        raise ValueError(f"max_basis: expected at least {pairs} + {2 * block_size} = {least} vectors, got {max_basis}")
    return ends * k


def _starts(operator: LinearOperator, start: Tensor | None, block_size: int, generator: torch.Generator) -> Tensor:
    """(block_size, n): the columns given, completed by random vectors."""
    if start is None:
        return gaussian((block_size, operator.size), generator)
    if not isinstance(start, Tensor) or start.is_complex():
        got = start.dtype if isinstance(start, Tensor) else type(start).__name__
        raise TypeError(f"start: expected a real tensor of shape ({operator.size},), got {got}")
    shapes = [(operator.size,), *((operator.size, j) for j in range(1, block_size + 1) if block_size > 1)]
    if tuple(start.shape) not in shapes:
        raise ValueError(f"start: expected shape {' or '.join(map(str, shapes))}, got {tuple(start.shape)}")
    given = start.to(operator.device, basis_dtype(operator)).reshape(operator.size, -1).mT
    return torch.cat([given, gaussian((block_size - len(given), operator.size), generator).to(given)])
