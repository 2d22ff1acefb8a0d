"""The loss along the Hessian's top eigenvectors and along random directions: how far does the quadratic model hold?"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from losslab.operators.finite_difference import hessian_of
from losslab.operators.required import require_risk
from losslab.operators.risk import EmpiricalRisk
from losslab.probes.balls.neighbourhood import Neighbourhood
from losslab.probes.base import ProbeResult
from losslab.probes.parabola import fit, valid_to
from losslab.random import gaussian, make_generator
from losslab.solvers.lanczos import eigenpairs
from losslab.status import Progress, Stages, Status, StopRequested, worst

_FORWARD, _PRODUCT, _EXPECTED_MATVECS = 0.3, 1.5, 20  # for the progress only
_SURE, _AGREES = 3.0, 0.01  # standard errors, and share of λ, by which a fitted curvature may differ


@dataclass(frozen=True)
class PerturbationResult(ProbeResult):
    """L(θ + εv) along D directions v of unit length: the top eigenvectors, then random ones.

    Attributes:
        directions: Their names.
        epsilons: (E,) symmetric, 0 among them, in units of θ.
        losses: (D, E); NaN where the loss is, or was not reached.
        slopes: (D,) gᵀv.
        curvatures: (D,) vᵀHv: an eigenvalue, or the curvature along a random direction.
        curvature_errors: (D,) bounds: residuals of the eigenvalues, rounding of the others.
        fitted: (D,) the second derivative of a cubic fitted to each row of `losses`, over all ε.
        fitted_errors: (D,) one standard error, from what the cubic leaves.
        valid_to: (D,) up to which |ε| the loss is within a tenth of the quadratic term of L + gᵀv ε + ½λε².
        remarks: (D) in words, whether fitted and true curvature agree, and where the quadratic model ends.
        distance: The largest ε.
        relative_distance: It over ‖θ‖.
        loss: L(θ).
        matvecs: Products used.
    """

    directions: tuple[str, ...]
    epsilons: np.ndarray
    losses: np.ndarray
    slopes: np.ndarray
    curvatures: np.ndarray
    curvature_errors: np.ndarray
    fitted: np.ndarray
    fitted_errors: np.ndarray
    valid_to: np.ndarray
    remarks: tuple[str, ...]
    distance: float
    relative_distance: float
    loss: float
    matvecs: int
    seed: int | None

    def __str__(self) -> str:
        return "\n".join(self.remarks)


def perturbation(
    risk: EmpiricalRisk,
    *,
    k: int = 2,
    num_random: int = 2,
    distance: float = 0.02,
    relative: bool = True,
    resolution: int = 21,
    seed: int = 0,
    progress: Progress | None = None,
) -> PerturbationResult:
    """Is the loss as curved as its Hessian says?  L(θ + εv), |ε| ≤ distance, along eigenvectors and random directions.

    A cubic is fitted to each curve by least squares, so that a lopsided valley does not pass for another curvature;
    its second derivative at 0 is compared with λ = vᵀHv. Where they differ by more than three standard errors and 1 %
    of λ, the range is wider than the quadratic model holds, and a remark says up to which ε it does: until the loss
    differs from L + gᵀv ε + ½λε² by a tenth of the quadratic term. Where three times the rounding of the losses is more
    than λ there is nothing to compare, and the remark says so.

    Args:
        risk: Where.
        k: Eigenvectors of the largest eigenvalues.
        num_random: Random directions, uniform on the sphere; their expected curvature is tr H/P.
        distance: The largest ε; in units of ‖θ‖ if `relative`, else absolute.
        relative: See `distance`.
        resolution: Points a direction; odd, so that 0 is one of them, and at least 5.
        seed: Of start vectors and directions.
        progress: Called after each product and each point.

    Returns:
        PerturbationResult; `remarks` in words. Cost: the eigenvectors (10 to 30 products), a product for each random
        direction, one gradient, and (k + num_random)·resolution forward passes.

    Raises:
        ValueError: An argument out of range.
        UserWarning: A module without second derivatives; then products are finite differences of gradients.
    """
    require_risk(risk)
    _check(k, num_random, resolution)
    if not distance > 0:
        raise ValueError(f"distance: expected a number > 0, got {distance!r}")
    if relative and not risk.space.norm() > 0:
        raise ValueError("distance: a relative one needs parameters that are not all zero; pass relative=False")
    around = Neighbourhood.around(risk, distance, relative=relative)
    half, count = resolution // 2, k + num_random
    epsilons = np.arange(-half, half + 1) * (around.radius / half)  # exactly symmetric, exactly zero in the middle
    curvature, points = _PRODUCT * _EXPECTED_MATVECS, count * resolution * _FORWARD
    stages = Stages(progress, curvature + points)
    found = _directions(risk, k, num_random, seed, stages.stage(curvature, expected=_EXPECTED_MATVECS))
    losses, status = _losses(risk, around.centre, found.vectors, epsilons, stages.stage(points))
    precision = 4 * max(torch.finfo(risk.dtype).eps, torch.finfo(torch.float64).eps)  # of a mean of losses
    fitted, errors, rounding, reach = _fits(epsilons, losses, found, precision)
    names = [f"eigenvector {i + 1}" for i in range(k)] + [f"random {i + 1}" for i in range(num_random)]
    # Where even a curvature of zero would agree, the losses' rounding hides it.
    hidden = np.where(_SURE * rounding + found.errors > np.abs(found.curvatures), str(risk.dtype).split(".")[1], "")
    rows = zip(names, found.curvatures, found.errors, fitted, errors, reach, hidden, strict=True)
    return PerturbationResult(
        status=worst(found.status, status),
        directions=tuple(names),
        epsilons=epsilons,
        losses=losses,
        slopes=found.slopes,
        curvatures=found.curvatures,
        curvature_errors=found.errors,
        fitted=fitted,
        fitted_errors=errors,
        valid_to=reach,
        remarks=tuple(_remark(*row, distance=around.radius) for row in rows),
        distance=around.radius,
        relative_distance=around.radius / around.size if around.size else math.inf,
        loss=float(losses[0, half]),
        matvecs=found.matvecs,
        seed=seed,
    )


@dataclass(frozen=True)
class _Directions:
    """Unit vectors (D, P) with slope and curvature along each."""

    vectors: Tensor
    slopes: np.ndarray
    curvatures: np.ndarray
    errors: np.ndarray
    matvecs: int
    status: Status


def _directions(risk: EmpiricalRisk, k: int, num_random: int, seed: int, progress: Progress | None) -> _Directions:
    hessian = hessian_of(risk)
    pairs = eigenpairs(hessian, k, which="largest", seed=seed, progress=progress)
    assert pairs.vectors is not None
    drawn = gaussian((num_random, risk.space.size), make_generator(seed), dtype=torch.float64)
    drawn = (drawn / drawn.norm(dim=1, keepdim=True)).to(risk.device, risk.dtype)
    products = hessian.matmat(drawn.mT).mT.double()
    curvatures = (drawn.double() * products).sum(dim=1).cpu().numpy()
    rounding = hessian.precision * products.norm(dim=1).cpu().numpy()
    vectors = torch.cat([pairs.vectors.mT.to(drawn), drawn])
    return _Directions(
        vectors=vectors,
        slopes=(vectors.double() @ risk.gradient().double()).cpu().numpy(),
        curvatures=np.concatenate([pairs.values, curvatures]),
        errors=np.concatenate([pairs.errors, rounding]),
        matvecs=pairs.matvecs + num_random,
        status=pairs.status,
    )


def _losses(
    risk: EmpiricalRisk, theta: Tensor, vectors: Tensor, epsilons: np.ndarray, progress: Progress | None
) -> tuple[np.ndarray, Status]:
    """(D, E), from the middle outwards; NaN for what was not reached when it was told to stop."""
    losses, order = np.full((len(vectors), len(epsilons)), math.nan), list(_outwards(len(epsilons)))
    for done, (i, j) in enumerate(((i, j) for j in order for i in range(len(vectors))), start=1):
        losses[i, j] = risk.loss_at(torch.add(theta, vectors[i], alpha=float(epsilons[j])))
        try:
            if progress is not None:
                progress(done, losses.size, f"ε = {epsilons[j]:.3g}")
        except StopRequested:
            return losses, Status.stopped
    return losses, Status.complete if np.isfinite(losses).all() else Status.nonfinite


def _fits(
    epsilons: np.ndarray, losses: np.ndarray, found: _Directions, precision: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Each direction's fitted curvature, its error, how much of that is rounding, and the quadratic model's reach."""
    rows = []
    for row, slope, curvature in zip(losses, found.slopes, found.curvatures, strict=True):
        cubic = fit(epsilons, row, precision)
        reach = valid_to(epsilons, row, slope, curvature, precision)
        rows.append((cubic.curvature, cubic.error, cubic.rounding, reach))
    fitted, errors, rounding, reaches = np.array(rows).T
    return fitted, errors, rounding, reaches


def _outwards(count: int) -> Iterator[int]:
    """Indices from the middle to both ends: what is known of an interrupted curve is symmetric."""
    middle = count // 2
    yield middle
    for step in range(1, middle + 1):
        yield from (middle - step, middle + step)


def _remark(
    name: str,
    curvature: float,
    bound: float,
    fitted: float,
    error: float,
    reach: float,
    hidden: str,
    *,
    distance: float,
) -> str:
    """In words; `hidden` is the type in whose rounding the curvature is lost, if it is."""
    truth = f"λ = {curvature:.4g}"
    if math.isnan(fitted):
        return f"{name}: {truth}; too few finite losses to fit a curvature"
    agree = abs(fitted - curvature) <= max(_SURE * error + bound, _AGREES * abs(curvature))
    said = f"{name}: fitted {fitted:.4g} ± {error:.1g} against {truth}"
    if agree and hidden:
        return f"{said}: not measurable in {hidden}; take a larger distance, or a type of more digits"
    said += f": they {'agree' if agree else 'differ'}"
    if reach == 0:
        return f"{said}; the quadratic model ends before the first point: take a smaller distance"
    if reach < distance:
        return f"{said}; the quadratic model ends at |ε| = {reach:.3g}"
    return said if agree else f"{said}, by less than a tenth of the quadratic term up to |ε| = {reach:.3g}"


def _check(k: int, num_random: int, resolution: int) -> None:
    for name, value, least in (("k", k, 1), ("num_random", num_random, 0)):
        if type(value) is not int or value < least:
            raise ValueError(f"{name}: expected a number >= {least}, got {value!r}")
    if type(resolution) is not int or resolution < 5 or resolution % 2 == 0:
        raise ValueError(f"resolution: expected an odd number >= 5, so that 0 is a point, got {resolution!r}")
