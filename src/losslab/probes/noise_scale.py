"""The gradient noise scale: from which batch size on do larger batches help less?"""

import math
from dataclasses import dataclass

import numpy as np

from losslab.probes.gradient_moments import GradientMoments


@dataclass(frozen=True)
class NoiseScale:
    """B = tr Σ/‖G‖² of the distribution that the examples are a sample of; standard errors by the jackknife.

    Attributes:
        value: The noise scale, in examples; ∞ where `signal` is not above zero.
        standard_error: Of it, to first order.
        trace: tr Σ, the scatter of one example's gradient about the true one, without bias.
        trace_error: Of it.
        signal: ‖G‖², the squared length of the true gradient, without bias: below zero by chance where G is near zero.
        signal_error: Of it. A signal within two of these of zero is none that these data show.
    """

    value: float
    standard_error: float
    trace: float
    trace_error: float
    signal: float
    signal_error: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.standard_error:.1g}"


def two_batch(small: float, b: float, large: float, size: float) -> tuple[float, float]:
    """(‖G‖², tr Σ) without bias from E‖g_b‖² of batches of b examples, and of `size`, b < size.

    E‖g_b‖² = ‖G‖² + tr Σ/b for a mean over b examples; two sizes give both (McCandlish et al. 2018, appendix A.1).
    Average what is put in, or what comes out, before dividing one by the other.

    >>> two_batch(small=1 + 8 / 2, b=2, large=1 + 8 / 4, size=4)
    (1.0, 8.0)
    """
    return (size * large - b * small) / (size - b), (small - large) / (1 / b - 1 / size)


def noise_scale(moments: GradientMoments) -> NoiseScale:
    """From every example as a small batch, averaged, against all of them as the large one.

    No other small batch makes a better one, as they are means of these. Leaving out one of the G random groups at a
    time gives the standard errors: √((G−1)/G · Σ(θ₋ₖ − mean)²) (Efron & Tibshirani 1993, chapter 11).

    Returns:
        NoiseScale; NaN where there are fewer than two examples, its errors where there are fewer than three.
    """
    counts, squares = moments.counts.numpy(), moments.squares.numpy()
    everything = moments.sums.sum(dim=0)
    means = [float(everything.double().square().sum())]
    means += [float((everything - part).double().square().sum()) for part in moments.sums]
    sizes = np.array([counts.sum(), *(counts.sum() - counts)])
    totals = np.array([squares.sum(), *(squares.sum() - squares)])
    if sizes[0] < 2:
        return NoiseScale(*[math.nan] * 6)
    if sizes.min() < 2:
        sizes, totals, means = sizes[:1], totals[:1], means[:1]
    pairs = np.array([two_batch(t / n, 1, m / n**2, n) for t, m, n in zip(totals, means, sizes, strict=True)])
    signal, trace = (float(x) for x in pairs[0])
    covariance = np.full((2, 2), math.nan)
    if len(pairs) > 2:
        covariance = np.cov(pairs[1:].mT, bias=True) * (len(pairs) - 2)
    signal_error, trace_error = (math.sqrt(x) for x in covariance.diagonal())
    if not signal > 0:
        return NoiseScale(math.inf, math.inf, trace, trace_error, signal, signal_error)
    slopes = np.array([-trace / signal**2, 1 / signal])
    error = math.sqrt(max(float(slopes @ covariance @ slopes), 0.0)) if len(pairs) > 2 else math.nan
    return NoiseScale(trace / signal, error, trace, trace_error, signal, signal_error)
