"""How well a kernel agrees with the labels: two numbers between 0 and 1."""

import math

import torch
from torch import Tensor


def centred_alignment(theta: Tensor, labels: Tensor | None, width: int | None) -> float:
    """⟨K_c, YYᵀ⟩/(‖K_c‖_F ‖(YYᵀ)_c‖_F), K_ij = Σ_c Θ_{ic,jc} (Cortes, Mohri & Rostamizadeh 2012, definition 4).

    Args:
        theta: Θ, (n·C, n·C), float64 on the host.
        labels: Y, (n·C,).
        width: C.

    Returns:
        NaN without labels or one width, or where either kernel is constant.
    """
    if labels is None or width is None:
        return math.nan
    num = len(theta) // width
    between = torch.einsum("icjc->ij", theta.view(num, width, num, width))
    y = labels.double().cpu().view(num, width)
    centred, ideal = (_centred(matrix) for matrix in (between, y @ y.mT))
    norms = float(centred.norm() * ideal.norm())
    return float((centred * ideal).sum()) / norms if norms else math.nan


def label_quotient(theta: Tensor, labels: Tensor | None, largest: float) -> float:
    """yᵀΘy/(‖y‖²λ_max): the mean eigenvalue that the labels see, in units of the largest; NaN without labels."""
    if labels is None or not largest or not labels.any():
        return math.nan
    y = labels.double().cpu()
    return float(y @ theta @ y) / (float(y @ y) * largest)


def _centred(matrix: Tensor) -> Tensor:
    matrix = matrix - matrix.mean(0, keepdim=True)
    return matrix - matrix.mean(1, keepdim=True)
