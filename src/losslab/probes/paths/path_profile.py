"""The loss along a polyline of pivots: sampled densely, and where it asks for another pivot."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.integrate import trapezoid
from torch import Tensor

from losslab.probes.paths.potential import Potential
from losslab.probes.paths.tangents import lengths


@dataclass(frozen=True)
class PathProfile:
    """Losses at D = (n−1)(s+1) + 1 points: the n pivots, and s points evenly between each pivot and the next.

    Attributes:
        positions: Distance along the path, (D,).
        losses: (D,), NaN where the loss is.
        subdivisions: s.
    """

    positions: np.ndarray
    losses: np.ndarray
    subdivisions: int

    @classmethod
    def of(cls, path: Tensor, losses: np.ndarray, subdivisions: int) -> "PathProfile":
        """The profile of a path (n, P) whose losses are known."""
        steps = np.repeat(lengths(path).cpu().numpy() / (subdivisions + 1), subdivisions + 1)
        return cls(np.concatenate([[0.0], np.cumsum(steps)]), losses, subdivisions)

    @property
    def pivots(self) -> slice:
        """Which of the points are pivots."""
        return slice(None, None, self.subdivisions + 1)

    @property
    def saddle(self) -> float:
        """The largest loss sampled; NaN where there is one."""
        return float(self.losses.max())

    @property
    def mean(self) -> float:
        """The mean loss along the path, by length, as the trapezoidal rule has it."""
        length = self.positions[-1]
        return float(trapezoid(self.losses, self.positions) / length if length else self.losses.mean())


def profile_of(potential: Potential, path: Tensor, subdivisions: int) -> PathProfile:
    """Sample a path (n, P). Cost: D losses, gap by gap, so that s + 1 points are in memory at once."""
    fractions = torch.arange(subdivisions + 1, dtype=path.dtype, device=path.device)[:, None] / (subdivisions + 1)
    losses = [potential.losses(torch.lerp(path[i], path[i + 1], fractions)) for i in range(len(path) - 1)]
    losses.append(potential.losses(path[-1:]))
    return PathProfile.of(path, torch.cat(losses).cpu().numpy(), subdivisions)


def insertions(profile: PathProfile, threshold: float, count: int) -> list[tuple[int, float]]:
    """Where do pivots lack?  At most `count` pairs (gap, fraction of the gap), by gap.

    A sampled point's excess is its loss over the linear interpolation of the gap's two pivots, as a share of the range
    of all pivots' losses. Each gap offers its point of largest excess, if that is above the threshold; the gaps of
    largest excess get a pivot there (Draxler et al. 2018, sec. 3.1).
    """
    parts = profile.subdivisions + 1
    pivots = profile.losses[profile.pivots]
    inside = profile.losses[:-1].reshape(-1, parts)[:, 1:]
    fractions = np.arange(1, parts) / parts
    chord = pivots[:-1, None] * (1 - fractions) + pivots[1:, None] * fractions
    # A range within float32's rounding of the losses is none.
    scale = max(float(np.ptp(pivots)), 1e-6 * float(np.abs(profile.losses).max()), np.finfo(float).tiny)
    excess = (inside - chord) / scale
    best = excess.argmax(1)
    scores = excess.max(1)
    wanted = [gap for gap in np.argsort(-scores, kind="stable")[:count] if scores[gap] > threshold]
    return [(int(gap), float(fractions[best[gap]])) for gap in sorted(wanted)]


def inserted(path: Tensor, targets: np.ndarray, places: list[tuple[int, float]]) -> tuple[Tensor, np.ndarray]:
    """The path with pivots at these places, and its target distances split in the same proportion."""
    rows, shares, new = list(path), list(targets), dict(places)
    for gap in sorted(new, reverse=True):
        fraction = new[gap]
        rows.insert(gap + 1, torch.lerp(path[gap], path[gap + 1], fraction))
        shares[gap : gap + 1] = [targets[gap] * fraction, targets[gap] * (1 - fraction)]
    return torch.stack(rows), np.array(shares)
