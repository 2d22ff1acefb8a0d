"""Eigenpairs by thick-restart Lanczos, stopped on residuals."""

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from losslab.operators.base import LinearOperator
from losslab.random import gaussian, make_generator
from losslab.solvers.estimate import Eigenpairs
from losslab.solvers.krylov import Krylov
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
    max_basis: int | None = None,
    max_matvecs: int | None = None,
    vectors: bool = True,
    seed: int | torch.Generator = 0,
    start: Tensor | None = None,
    progress: Progress | None = None,
) -> Eigenpairs:
    """Which are the k outermost eigenvalues of A, and how well are they known?

    Thick-restart Lanczos (Wu & Simon 2000) with full reorthogonalisation; a pair has converged when its residual bound
    |β s_mi| ≤ tol·|θ_i|. An invariant subspace met on the way is searched on from a new random vector, so that
    multiple eigenvalues of exactly structured matrices are found as often as they occur.

    Args:
        operator: Symmetric n×n.
        k: How many, 1 ≤ k ≤ n; with "both_ends" k at each end (2k ≤ n).
        which: "largest_magnitude", "largest", "smallest" (algebraically), or "both_ends" (the largest, then the smallest).
        tol: Relative residual to stop at.
        max_basis: Vectors kept at most (memory max_basis × n numbers); default max(2k + 20, 40).
        max_matvecs: Products at most; default 20·max_basis.
        vectors: Whether to return the eigenvectors.
        seed: Of the start vector; or a generator.
        start: A start vector of one's own, for example from a run nearby.
        progress: Called after each product.

    Returns:
        Eigenpairs, sorted as asked; `status` says whether all converged. Cost: `matvecs` products.

    Raises:
        ValueError: k, tol, max_basis or which out of range; a start vector of another shape, zero, or not finite.
    """
    wanted = _check(operator, k, which, tol, max_basis, max_matvecs)
    max_basis = min(max_basis or max(2 * wanted + 20, 40), operator.size)
    max_matvecs = max_matvecs or 20 * max_basis
    generator = make_generator(seed)
    if start is None:
        start = gaussian((operator.size,), generator)
    elif start.shape != (operator.size,):
        raise ValueError(f"start: expected shape ({operator.size},), got {tuple(start.shape)}")
    krylov = Krylov(operator, start, max_basis)
    search = Search(krylov, k, which, tol)
    status = run(search, lambda: search.found(), max_matvecs, generator, progress)
    return search.result(status, vectors, seed if isinstance(seed, int) else None)


def run(
    search: "Search",
    finished: Callable[[], bool],
    max_matvecs: int,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> Status:
    """Extend the Krylov space, restarting when it is full, until `finished`, the budget, or nothing is left to search."""
    krylov = search.krylov
    while krylov.matvecs < max_matvecs:
        if krylov.full:
            search.compress()
        krylov.step()
        if not krylov.finite:
            return Status.nonfinite
        if progress is not None:
            progress(krylov.matvecs, max_matvecs, search.note())
        if finished():
            return Status.breakdown if krylov.broken else Status.converged
        if krylov.broken:
            if krylov.full and krylov.size < krylov.operator.size:
                search.compress()
            if not krylov.new_block(gaussian((krylov.operator.size,), generator)):
                return Status.breakdown
    return Status.budget_reached


class Search:
    """Which Ritz pairs of a Krylov space are wanted, and have they converged?"""

    def __init__(self, krylov: Krylov, k: int, which: Which, tol: float):
        self.krylov, self.k, self.tol = krylov, k, tol
        self.keys = _KEYS[which]
        self._had_breakdown = False

    def selection(self, values: np.ndarray, extra: int = 0) -> np.ndarray:
        """Indices of the k wanted Ritz values (`extra` more at each end that is wanted), best first."""
        ends = [np.argsort(-key(values), kind="stable")[: self.k + extra] for key in self.keys]
        return np.array(list(dict.fromkeys(np.concatenate(ends).tolist())), dtype=int)

    def found(self) -> bool:
        """Whether every wanted pair has converged, and nothing better can hide behind an invariant subspace."""
        krylov = self.krylov
        self._had_breakdown |= krylov.broken
        values, residuals, vectors = krylov.ritz()
        chosen = self.selection(values)
        if len(chosen) < self.k * len(self.keys) or not self._converged(values, residuals)[chosen].all():
            return krylov.size == krylov.operator.size
        return not self._had_breakdown or krylov.size == krylov.operator.size or self._block_adds_nothing()

    def compress(self) -> None:
        """Thick restart: keep the wanted pairs, and as many of the next ones as leave the space half empty."""
        krylov = self.krylov
        values, _, vectors = krylov.ritz()
        extra = max(krylov.capacity // 2 // len(self.keys) - self.k, 1)
        krylov.restart(np.sort(self.selection(values, extra)[: krylov.capacity - 2]), values, vectors)

    def result(self, status: Status, vectors: bool, seed: int | None, *, wanted_only: bool = True) -> Eigenpairs:
        """The wanted pairs (or all Ritz pairs, ascending) as they are now."""
        krylov = self.krylov
        values, residuals, columns = krylov.ritz()
        chosen = self.selection(values) if wanted_only else np.arange(len(values))
        rounding = np.finfo(columns.dtype).eps if krylov.basis.dtype == torch.float64 else torch.finfo(torch.float32).eps
        rounding *= np.abs(values).max(initial=0.0)
        return Eigenpairs(
            values=values[chosen],
            residuals=np.maximum(residuals, rounding)[chosen],
            errors=np.maximum(error_bounds(values, residuals), rounding)[chosen],
            converged=self._converged(values, residuals)[chosen],
            vectors=krylov.ritz_vectors(columns[:, chosen]) if vectors else None,
            matvecs=krylov.matvecs,
            status=status,
            basis_bytes=krylov.basis.numel() * krylov.basis.element_size(),
            seed=seed,
        )

    def note(self) -> str:
        """The present Ritz values and residuals, for a progress bar."""
        values, residuals, _ = self.krylov.ritz()
        return " ".join(f"{values[i]:.4g}±{residuals[i]:.0e}" for i in self.selection(values)[:5])

    def _converged(self, values: np.ndarray, residuals: np.ndarray) -> np.ndarray:
        # Below the rounding of ‖A‖ a residual cannot fall: an eigenvalue of zero has converged there.
        floor = 1e2 * torch.finfo(self.krylov.basis.dtype).eps * np.abs(values).max(initial=0.0)
        return residuals <= np.maximum(self.tol * np.abs(values), floor)

    def _block_adds_nothing(self) -> bool:
        """After a breakdown T is block-diagonal and the newest block searches the complement of the others.

        Its outermost value, once converged, bounds what the complement holds: if it is not better than the k-th wanted
        one, no further copy of a multiple eigenvalue is missing.
        """
        values, residuals, vectors = self.krylov.ritz()
        newest = np.flatnonzero((vectors[self.krylov.block_start :] ** 2).sum(axis=0) > 0.5)
        if not len(newest):
            return False
        slack = 1e-6 * np.abs(values).max(initial=0.0)
        converged = self._converged(values, residuals)
        for key in self.keys:
            best = newest[np.argmax(key(values[newest]))]
            last_wanted = np.sort(key(values))[::-1][self.k - 1]
            if not converged[best] or key(values[best]) > last_wanted + slack:
                return False
        return True


def error_bounds(values: np.ndarray, residuals: np.ndarray) -> np.ndarray:
    """min(r, r²/gap) for each of the ascending Ritz values (Kato–Temple), gap to the nearest other one's interval.

    The gap is measured to the nearest Ritz value less that one's residual; where intervals overlap the bound is r.
    """
    if len(values) < 2:
        return residuals.copy()
    gaps = np.full(len(values), np.inf)
    for i in range(len(values)):
        for j in (i - 1, i + 1):
            if 0 <= j < len(values):
                gaps[i] = min(gaps[i], abs(values[i] - values[j]) - residuals[j])
    with np.errstate(divide="ignore", invalid="ignore"):
        sharp = np.where(gaps > residuals, residuals**2 / gaps, residuals)
    return np.minimum(residuals, sharp)


def _check(
    operator: LinearOperator, k: int, which: str, tol: float, max_basis: int | None, max_matvecs: int | None
) -> int:
    """Refuse what cannot be computed; returns the number of pairs wanted in all."""
    if which not in get_args(Which):
        raise ValueError(f"which: expected one of {', '.join(get_args(Which))}; got {which!r}")
    wanted = 2 * k if which == "both_ends" else k
    if not isinstance(k, int) or k < 1 or wanted > operator.size:
        limit = operator.size // 2 if which == "both_ends" else operator.size
        raise ValueError(f"k: expected 1 <= k <= {limit} for an operator of size {operator.size}, got {k!r}")
    if not tol > 0:
        raise ValueError(f"tol: expected a number > 0, got {tol!r}")
    if max_basis is not None and max_basis < min(wanted + 2, operator.size):
        raise ValueError(f"max_basis: expected at least k + 2 = {wanted + 2} vectors, got {max_basis}")
    if max_matvecs is not None and max_matvecs < 1:
        raise ValueError(f"max_matvecs: expected at least 1, got {max_matvecs}")
    return wanted
