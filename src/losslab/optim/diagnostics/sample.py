"""What is known of one tensor at one sampled step, and under which of the eight fixes each number belongs."""

import math
from dataclasses import dataclass

NAN = math.nan
LEVELS = (0.0, 5.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 95.0, 100.0)  # of `eigenvalues`, in percent
BINS = 20  # the most groups of eigenvalues in a profile

# TensorBoard makes a page of what stands before the first "/", and would write "_" for a space itself.
PAGES = {
    "talt_1_adaptive_memory": ("rank_left", "rank_right", "remembered", "state_numbers"),
    "talt_2_dynamic_updates": ("refreshes", "early", "staleness", "gradient_change", "off_diagonal"),
    "talt_3_statistical_thresholds": ("low", "high", "valley_share", "high_share", "smallest", "median", "largest"),
    "talt_4_gradient_smoothing": ("gradient_norm", "smoothed_norm", "signal"),
    "talt_5_incremental_covariance": ("condition", "covariance_distance"),
    "talt_6_parameter_normalization": ("normalized_norm", "update_norm", "gradient_spread", "update_spread"),
    "talt_7_selective_amplification": ("amplification", "gate", "near", "level"),
    "talt_8_transformation_stability": ("rotation_left", "rotation_right", "consistency", "alignment"),
}
OF_ALL = ("gradient_spread", "update_spread")  # one number a sample, the same in each tensor's record


@dataclass(frozen=True)
class TALTSample:
    """One tensor at one step, as the step met it: with the basis, the covariance and the thresholds it used.

    λ are the entries of TALT's table of averaged squares, in units of the squared gradient. What a tensor does not
    have, for one thing before its first basis, is NaN.

    Attributes:
        step: The tensor's steps, this one included.
        name: The tensor's.
        shape: The tensor's own.
        structure: How TALT sees it.
        rank_left: Directions that are kept of its shorter side's space.
        rank_right: Of its longer side's.
        remembered: Gradients that are remembered, where covariances are not incremental.
        state_numbers: Numbers in its state.
        refreshes: Bases so far.
        early: Those that a trigger brought.
        trigger: Which one may.
        staleness: Steps since the basis was made, this one included.
        gradient_change: ‖M − M_before‖ / ‖M‖ of the averaged gradient.
        off_diagonal: Share of QᵀCQ off its diagonal, in the Frobenius norm, of the worse side.
        eigenvalues: Percentiles of λ at `LEVELS`.
        low: The threshold of valleys.
        high: The threshold of high curvature.
        valley_share: Share of all directions whose λ is below `low`.
        high_share: Share of all directions whose λ is above `high`.
        condition: Largest λ over smallest.
        gradient_norm: ‖G‖, the step's gradient.
        smoothed_norm: ‖M̂‖, its average.
        signal: ‖M̂‖² over the sum of all λ: 1 where gradients agree, (1 − β)/(1 + β) where they are noise.
        covariance_distance: ‖C − B‖ / ‖B‖ in the Frobenius norm, both of trace 1, on the shorter side. B is the plain
            mean over the last sampled gradients (`history.WINDOW`), this one included.
        normalized_norm: ‖M̂ ⊙ λ^−p‖: without amplification, damping and clipping.
        update_norm: ‖U‖, what the learning rate multiplies.
        gradient_spread: Largest root mean square of a tensor's gradient over the smallest, in the sample.
        update_spread: The same of the updates.
        amplification: Mean factor by which directions in valleys are amplified.
        gate: How far the gate of valleys is open, 0 to 1, mean over all directions.
        near: Whether TALT holds a minimum to be near, so that it amplifies less.
        level: Mean λ over the largest that it has been.
        rotation_left: Mean principal angle in degrees between the leading directions of the shorter side then (at the
            sample before) and now.
        rotation_right: Of the longer side.
        consistency: Cosine between this update and that of the sample before.
        alignment: Cosine between the update and the gradient.
        profile_eigenvalue: λ in up to `BINS` groups of equal size, the largest first: mean of each group.
        profile_gradient: Root mean square of the gradient's entries in the eigenspace, in these groups.
        profile_smoothed: Of the averaged gradient's.
        profile_update: Of the update's.
    """

    step: int
    name: str
    shape: tuple[int, ...]
    structure: str
    rank_left: int
    rank_right: int
    remembered: int
    state_numbers: int
    trigger: str
    refreshes: int = 0
    early: int = 0
    near: bool = False
    staleness: float = NAN
    gradient_change: float = NAN
    off_diagonal: float = NAN
    eigenvalues: tuple[float, ...] = ()
    low: float = NAN
    high: float = NAN
    valley_share: float = NAN
    high_share: float = NAN
    condition: float = NAN
    gradient_norm: float = NAN
    smoothed_norm: float = NAN
    signal: float = NAN
    covariance_distance: float = NAN
    normalized_norm: float = NAN
    update_norm: float = NAN
    gradient_spread: float = NAN
    update_spread: float = NAN
    amplification: float = NAN
    gate: float = NAN
    level: float = NAN
    rotation_left: float = NAN
    rotation_right: float = NAN
    consistency: float = NAN
    alignment: float = NAN
    profile_eigenvalue: tuple[float, ...] = ()
    profile_gradient: tuple[float, ...] = ()
    profile_smoothed: tuple[float, ...] = ()
    profile_update: tuple[float, ...] = ()

    @property
    def smallest(self) -> float:
        """The smallest eigenvalue."""
        return self.eigenvalues[0] if self.eigenvalues else NAN

    @property
    def median(self) -> float:
        """The middle eigenvalue."""
        return self.eigenvalues[LEVELS.index(50.0)] if self.eigenvalues else NAN

    @property
    def largest(self) -> float:
        """The largest eigenvalue."""
        return self.eigenvalues[-1] if self.eigenvalues else NAN

    def scalars(self) -> dict[str, float]:
        """The numbers under "<page>/<number>/<tensor>", without those that the tensor does not have."""
        found = {}
        for page, names in PAGES.items():
            for name in names:
                value = float(getattr(self, name))
                if not math.isnan(value):
                    found[f"{page}/{name}" if name in OF_ALL else f"{page}/{name}/{self.name}"] = value
        return found
