"""What a picture shows, apart from who draws it: plain values that plotly and matplotlib both render.

A `Chart` holds panels side by side, a panel holds series. All numbers are those of the record; only `Landscape`
knows how to bring itself into a range that can be drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

# Okabe & Ito (2008), told apart by every kind of colour vision; without black and yellow, so that a colour reads on
# white and on dark paper alike, and with a grey as the last.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C")
NUM_LEVELS = 14


def colour(index: int) -> str:
    """The palette's colour at `index`, starting again after the last."""
    return PALETTE[index % len(PALETTE)]


@dataclass(frozen=True)
class Line:
    """A curve, and where `error` is given the band y ± error around it."""

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: str
    error: np.ndarray | None = None
    dashed: bool = False
    legend: bool = True


@dataclass(frozen=True)
class Points:
    """Markers, with bars y ± error where `error` is given; `x` holds numbers or names of categories."""

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: str
    error: np.ndarray | None = None
    joined: bool = False
    legend: bool = True


@dataclass(frozen=True)
class Landscape:
    """Heights over a plane, drawn between `low` and `high`, in decades of z where `log` is set.

    Shapes: x (A,), y (B,), z (B, A). NaN in z is a hole.
    """

    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    low: float
    high: float
    log: bool = False

    def heights(self) -> np.ndarray:
        """The z that is drawn: within [low, high], its decimal logarithm where `log` is set, NaN for holes."""
        return self.scaled(np.where(np.isnan(self.z), np.nan, np.clip(self.z, self.low, self.high)))

    def scaled(self, z: np.ndarray | float) -> np.ndarray:
        """Where a loss stands on the drawn axis."""
        return np.log10(z) if self.log else np.asarray(z, dtype=float)

    def levels(self) -> np.ndarray:
        """Heights of the contour lines on the drawn axis: equal steps, which are equal ratios where `log` is set."""
        return np.linspace(self.scaled(self.low), self.scaled(self.high), NUM_LEVELS)

    def ticks(self) -> tuple[np.ndarray, list[str]]:
        """About six round losses: their place on the drawn axis and how they are written."""
        if self.log:
            decades = np.arange(np.floor(np.log10(self.low)), np.ceil(np.log10(self.high)) + 1)
            factors = (1, 2, 5) if len(decades) < 4 else (1,)
            losses = np.array([factor * 10.0**decade for decade in decades for factor in factors])
        else:
            step = 10.0 ** np.floor(np.log10(self.high - self.low))
            step *= 0.2 if (self.high - self.low) / step < 3 else 1
            losses = np.arange(np.ceil(self.low / step), self.high / step + 1) * step
        losses = losses[(losses >= self.low * (1 - 1e-9)) & (losses <= self.high * (1 + 1e-9))]
        losses = losses[:: len(losses) // 7 + 1]
        return self.scaled(losses), [f"{loss:.3g}" for loss in losses]


@dataclass(frozen=True)
class Surface(Landscape):
    """The landscape in three dimensions, with contour lines on it and on the floor."""


@dataclass(frozen=True)
class Contour(Landscape):
    """The landscape from above, as filled contours with the origin marked."""


Series = Line | Points | Surface | Contour


@dataclass(frozen=True)
class Panel:
    """One pair of axes. `guides` are vertical lines at x; `x_step` the distance of ticks, None leaves it free."""

    x_label: str
    y_label: str
    series: Sequence[Series]
    title: str = ""
    log_y: bool = False
    y_range: tuple[float, float] | None = None
    x_step: float | None = None
    guides: Sequence[float] = ()


@dataclass(frozen=True)
class Chart:
    """A picture: `name` is its file's name, `caption` the one sentence on how to read it."""

    name: str
    title: str
    caption: str
    panels: Sequence[Panel] = field(default_factory=tuple)
    columns: int = 2

    @property
    def is_landscape(self) -> bool:
        """Whether it shows one plane, and so needs half the page's width."""
        return any(isinstance(series, Landscape) for panel in self.panels for series in panel.series)

    @property
    def is_solid(self) -> bool:
        """Whether it is three-dimensional, which costs a browser one of its few WebGL contexts."""
        return any(isinstance(series, Surface) for panel in self.panels for series in panel.series)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of panels."""
        columns = min(self.columns, len(self.panels))
        return -(-len(self.panels) // columns), columns
