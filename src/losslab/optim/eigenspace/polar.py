"""The nearest orthogonal matrix, nearly: Muon's direction, TALT's where no covariance is kept, and what TALT makes of
its updates in the eigenspace.
"""

import math

import torch
from torch import Tensor

# Jordan et al. (2024): singular values end between 0.7 and 1.2 rather than at 1, and get there in five steps.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
# From this ratio of sides on, several steps at a time work on the short side alone: half the operations at 9, as 3×3
# convolutions have. Not all five, since XXᵀ keeps less of small singular values than X does.
LONG = 4
SPANS = (3, 2)
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
    """X ← aX + (bXXᵀ + c(XXᵀ)²)X from X = M, for matrices (b, m, n) of norm 1, or zero."""
    wide = M.shape[1] <= M.shape[2]
    X = M if wide else M.mT
    if X.shape[2] >= LONG * X.shape[1]:
        for steps in SPANS:
            X = torch.bmm(_product(torch.bmm(X, X.mT), steps), X)
    else:
        a, b, c = COEFFICIENTS
        for _ in range(STEPS):
            A = torch.bmm(X, X.mT)
            X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X if wide else X.mT


def _product(A: Tensor, steps: int) -> Tensor:
    """What so many iterations multiply X by, for A = XXᵀ (b, m, m): all they do is a polynomial in A."""
    a, b, c = COEFFICIENTS
    P = torch.baddbmm(A, A, A, beta=b, alpha=c)  # an iteration multiplies by aI + P
    found = P.clone()
    found.diagonal(dim1=1, dim2=2).add_(a)
    for _ in range(steps - 1):
        for _ in range(2):
            A = torch.baddbmm(A, A, P, beta=a)
        P = torch.baddbmm(A, A, A, beta=b, alpha=c)
        found = torch.baddbmm(found, found, P, beta=a)
    return found


def least(dtype: torch.dtype) -> float:
    """The length above which squares do not vanish, of a million entries: 1e-15 in float32.

    What is divided by at least this never has a norm above 1, which the iteration would blow up.
    """
    return 1e4 * math.sqrt(torch.finfo(dtype).tiny)


def _norm(M: Tensor) -> Tensor:
    """(b, 1, 1), too small below `least`."""
    return torch.linalg.vector_norm(M, dim=(1, 2), keepdim=True)
