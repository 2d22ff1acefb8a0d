"""From curvature to learning rate, as pure functions of numbers."""

import math

COOLDOWN = 0.4  # of a run; benchmarks/results/homotopy.md has it beside a cosine


def seed_factor(kappa: float, target: float, alpha: float, *, threshold: bool = False) -> float:
    """η/η₀ by the founders' rule: 1/(1 + α·κ/κ*), or as their code has it 1/(1 + α·max(0, κ/κ* − 1)).

    κ = ‖H‖/‖∇L‖² grows without bound towards a stationary point, so the rate falls as ‖∇L‖² there, and convergence is
    no longer linear.

    Args:
        kappa: κ, infinite where the gradient is zero.
        target: κ*; NaN, before there is one, slows nothing but an infinite κ.
        alpha: α.
        threshold: Which of the two.

    >>> seed_factor(1e4, 1e4, 1.0), seed_factor(1e4, 1e4, 1.0, threshold=True), seed_factor(math.inf, 1.0, 1.0)
    (0.5, 1.0, 0.0)
    """
    if math.isnan(kappa) or alpha == 0:
        return 1.0
    if math.isinf(kappa):
        return 0.0
    if math.isnan(target):
        return 1.0
    excess = kappa / target if target > 0 else (math.inf if kappa > 0 else 0.0)
    return 1.0 / (1.0 + alpha * (max(0.0, excess - 1.0) if threshold else excess))


def followed(peak: float, curvature: float, memory: float) -> float:
    """The curvature that is reckoned with: at once up to what is met, slowly down again, by the logarithm.

    A batch that is more curved than the others is one that training must survive; one that is flatter says nothing of
    the next.

    >>> followed(10.0, 40.0, 0.9), round(followed(10.0, 1.0, 0.9), 3)
    (40.0, 7.943)
    """
    if math.isnan(peak) or curvature >= peak:
        return curvature
    return peak**memory * curvature ** (1 - memory) if curvature > 0 else peak * memory


def averaged(mean: float, number: float, memory: float) -> float:
    """The exponential average, one number on. An infinite one, κ where the gradient is zero, is forgotten at once.

    >>> round(averaged(10.0, 20.0, 0.9), 3), averaged(math.nan, 20.0, 0.9), averaged(math.inf, 20.0, 0.9)
    (11.0, 20.0, 20.0)
    """
    known = math.isfinite(mean) and math.isfinite(number)
    return memory * mean + (1 - memory) * number if known else number


def stable_rate(curvature: float, limit: float, fraction: float) -> float:
    """The largest rate that is a `fraction` of the one at which a quadratic of this curvature diverges.

    >>> stable_rate(10.0, 3.8, 0.5), stable_rate(0.0, 3.8, 0.5)
    (0.19, inf)
    """
    return math.inf if not curvature > 0 or math.isnan(limit) else fraction * limit / curvature


def risen(rate: float, growth: float, ceiling: float) -> float:
    """One step up, no higher than the ceiling, which brakes at once.

    >>> risen(0.1, 1.1, 1.0), risen(0.1, 1.1, 0.05)
    (0.11000000000000001, 0.05)
    """
    return min(rate * growth, ceiling)


def decayed(step: int, start: int, total: int | None, shape: str) -> float:
    """What a schedule of its own multiplies the rate with: 1 up to `start`, from there to 0 at `total`.

    "cooldown" stays at 1 for the first three fifths, and falls in a straight line (warm-up, stable, decay: Hu et al.
    2024; Hägele et al. 2024).

    >>> decayed(0, 10, 110, "cosine"), round(decayed(60, 10, 110, "cosine"), 3), decayed(60, 10, 110, "linear")
    (1.0, 0.5, 0.5)
    >>> decayed(60, 10, 100, "cooldown"), decayed(80, 10, 100, "cooldown")
    (1.0, 0.5)
    """
    if total is not None and shape == "cooldown":
        start = max(start, total - round(COOLDOWN * total))
    if total is None or shape == "none" or step <= start:
        return 1.0
    done = min((step - start) / max(total - start, 1), 1.0)
    return 0.5 + 0.5 * math.cos(math.pi * done) if shape == "cosine" else 1.0 - done


def is_due(step: int, frequency: int) -> bool:
    """Whether curvature is measured after this step: in each at first, ever more seldom, every `frequency` in the end.

    Curvature changes fastest at the start, and a rate that rises must not run ahead of what is known. The interval is
    the largest power of two that is at most an eighth of the steps so far, so that eight estimates follow each doubling
    of them.

    >>> [step for step in range(14, 100) if is_due(step, 10)]
    [14, 15, 16, 18, 20, 22, 24, 26, 28, 30, 32, 36, 40, 44, 48, 52, 56, 60, 64, 72, 80, 88, 96]
    """
    return step % min(frequency, 1 << max(0, (step // 8).bit_length() - 1)) == 0
