"""The nearest orthogonal matrix, nearly: Muon's direction, TALT's where no covariance is kept, and what TALT makes of
its updates in the eigenspace.
"""

import math

import torch
from torch import Tensor

Step = tuple[float, float, float]
# Step by step, the odd polynomials ax + bx³ + cx⁵ that bring [0.003, 1] nearest to 1 (Amsel et al. 2025), found by
# linear programming: [0.78, 1.22] after four; Muon's five steps of one polynomial (Jordan et al. 2024) end between 0.68
# and 1.2. Each is made for an interval 1 % wider than the one before leaves, since they grow fast beyond it.
COEFFICIENTS: tuple[Step, Step, Step, Step] = (
    (8.3019, -24.0424, 17.4699),
    (4.0102, -2.9290, 0.5430),
    (3.5025, -2.5772, 0.5049),
    (2.5227, -1.8392, 0.4271),
)
# From this ratio of sides on, two steps at a time work on the short side alone: 0.6 of the operations at 9, as 3×3
# convolutions have. Not all four, since XXᵀ keeps less of small singular values than X does.
LONG = 4
MUON_RMS = 0.2  # times √max(m, n) a polar factor is as long as AdamW's updates are (Liu et al. 2025)


def polar(M: Tensor) -> Tensor:
    """Muon's update for matrices (b, m, n): the polar factor, as long as AdamW's updates are."""
    return newton_schulz(M / _norm(M).clamp_min_(least(M.dtype))) * (MUON_RMS * math.sqrt(max(M.shape[1:])))


def equalized(M: Tensor) -> Tensor:
    """Matrices (b, m, n) with their singular values nearly equal, and their norms as they were; zero stays zero."""
    norm, tiny = _norm(M), least(M.dtype)
    found = newton_schulz(M / norm.clamp_min(tiny))
    return found * (norm / _norm(found).clamp_min_(tiny))


def newton_schulz(M: Tensor) -> Tensor:
    """X ← aX + (bXXᵀ + c(XXᵀ)²)X from X = M/√‖MMᵀ‖, for matrices (b, m, n) of norm 1, or zero.

    √‖MMᵀ‖ is at least the largest singular value and at most m^¼ of it, where ‖M‖ may be √m of it: small ones begin
    nearer to 1 by what a step of the iteration would gain.
    """
    wide = M.shape[1] <= M.shape[2]
    X = M if wide else M.mT
    A = torch.bmm(X, X.mT)
    bound = _norm(A).clamp_min_(torch.finfo(M.dtype).eps)
    X, A = X / bound.sqrt(), A.div_(bound)
    first, second, third, fourth = COEFFICIENTS
    if X.shape[2] >= LONG * X.shape[1]:
        X = torch.bmm(_both(A, first, second), X)
        X = torch.bmm(_both(torch.bmm(X, X.mT), third, fourth), X)
    else:
        X = torch.baddbmm(X, _polynomial(A, first), X, beta=first[0])
        for step in (second, third, fourth):
            X = torch.baddbmm(X, _polynomial(torch.bmm(X, X.mT), step), X, beta=step[0])
    return X if wide else X.mT


def _polynomial(A: Tensor, step: Step) -> Tensor:
    """P = bA + cA²: a step multiplies by aI + P."""
    return torch.baddbmm(A, A, A, beta=step[1], alpha=step[2])


def _both(A: Tensor, first: Step, second: Step) -> Tensor:
    """What two steps multiply X by, for A = XXᵀ (b, m, m): all they do is a polynomial in A."""
    P = _polynomial(A, first)
    for _ in range(2):
        A = torch.baddbmm(A, A, P, beta=first[0])
    P.diagonal(dim1=1, dim2=2).add_(first[0])
    return torch.baddbmm(P, P, _polynomial(A, second), beta=second[0])


def least(dtype: torch.dtype) -> float:
    """The length above which squares do not vanish, of a million entries: 1e-15 in float32.

    What is divided by at least this never has a norm above 1, which the iteration would blow up.
    """
    return 1e4 * math.sqrt(torch.finfo(dtype).tiny)


def _norm(M: Tensor) -> Tensor:
    """(b, 1, 1), too small below `least`."""
    return torch.linalg.vector_norm(M, dim=(1, 2), keepdim=True)
