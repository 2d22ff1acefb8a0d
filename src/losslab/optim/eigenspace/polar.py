"""The nearest orthogonal matrix, nearly: Muon's direction, and TALT's where no covariance is kept."""

from torch import Tensor

# Jordan et al. (2024): singular values end between 0.7 and 1.2 rather than at 1, and get there in five steps.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


def newton_schulz(M: Tensor) -> Tensor:
    """X ← aX + (bXXᵀ + c(XXᵀ)²)X from X = M/‖M‖, for matrices (b, m, n); zero stays zero."""
    a, b, c = COEFFICIENTS
    wide = M.shape[1] <= M.shape[2]
    X = M if wide else M.mT
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp_min(1e-30)
    for _ in range(STEPS):
        gram = X @ X.mT
        X = a * X + (b * gram + c * (gram @ gram)) @ X
    return X if wide else X.mT
