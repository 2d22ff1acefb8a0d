"""What a picture shows, apart from who draws it: plain values that plotly and matplotlib both render.

A `Chart` holds panels side by side, a panel holds series. All numbers are those of the record; only
`Landscape` knows how to bring itself into a range that can be drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from losslab.report.images import Image

# Okabe & Ito (2008), told apart by every kind of colour vision; without black and yellow, so that a colour
# reads on white and on dark paper alike, and with a grey as the last.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C")
NUM_LEVELS = 14
LOG_FROM = 30.0  # ratio of largest to smallest value from which a linear axis hides the small ones


def colour(index: int) -> str:
    """The palette's colour at `index`, starting again after the last."""
    return PALETTE[index % len(PALETTE)]


def spans_decades(values: np.ndarray) -> bool:
    """Whether positive values differ so much that only a log axis shows them all."""
    finite = values[np.isfinite(values)]
    return bool(finite.size and finite.min() > 0 and finite.max() / finite.min() > LOG_FROM)


def linear_ticks(low: float, high: float) -> np.ndarray:
    """Four to ten multiples of 1, 2 or 5 times a power of ten within [low, high]."""
    power = 10.0 ** np.floor(np.log10(high - low))
    step = power * (0.2 if high - low < 2 * power else 0.5 if high - low < 5 * power else 1.0)
    return np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step


def log_ticks(low: float, high: float) -> np.ndarray:
    """Powers of ten within [low, high], with round numbers between them where those alone are too few."""
    decades = np.log10(high / low)
    factors = (1, 2, 3, 4, 6, 8) if decades < 1 else (1, 2, 5) if decades < 3 else (1,)
    powers = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1, np.ceil(decades / 9))
    values = (powers[:, None] * np.array(factors)).ravel()
    return values[(values >= low * (1 - 1e-9)) & (values <= high * (1 + 1e-9))]


def tick_label(value: float) -> str:
    """A tick's value as short as it can be read: 0.02, 500, 10⁻⁵."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.6g}".replace("-", "−")
    mantissa, exponent = f"{value:.2e}".split("e")
    power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    factor = mantissa.rstrip("0").rstrip(".").replace("-", "−")
    return power if factor == "1" else f"{factor}·{power}"


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
    """Markers, with bars y ± error where `error` is given; `x` holds numbers or names of categories.

    Where `values` are given they are the markers' colours, on a scale that `values_label` names.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: str
    error: np.ndarray | None = None
    joined: bool = False
    legend: bool = True
    values: np.ndarray | None = None
    values_label: str = ""


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
        """The z that is drawn: cut to [low, high], the decimal logarithm where `log` is set, NaN in holes."""
        return self.scaled(np.where(np.isnan(self.z), np.nan, np.clip(self.z, self.low, self.high)))

    def scaled(self, z: np.ndarray | float) -> np.ndarray:
        """Where a loss stands on the drawn axis."""
        return np.log10(z) if self.log else np.asarray(z, dtype=float)

    def levels(self) -> np.ndarray:
        """Contour lines in equal steps of the drawn axis, which are equal ratios where `log` is set."""
        return np.linspace(self.scaled(self.low), self.scaled(self.high), NUM_LEVELS)

    def ticks(self) -> tuple[np.ndarray, list[str]]:
        """Round losses: their place on the drawn axis and how they are written."""
        losses = log_ticks(self.low, self.high) if self.log else linear_ticks(self.low, self.high)
        return self.scaled(losses), [tick_label(loss) for loss in losses]


@dataclass(frozen=True)
class Surface(Landscape):
    """The landscape in three dimensions, with contour lines on it and on the floor."""


@dataclass(frozen=True)
class Contour(Landscape):
    """The landscape from above, as filled contours with the origin marked."""


Series = Line | Points | Surface | Contour | Image


@dataclass(frozen=True)
class Panel:
    """One pair of axes. `guides` are vertical lines at x; `x_step` the distance of ticks, None for any."""

    x_label: str
    y_label: str
    series: Sequence[Series]
    title: str = ""
    log_y: bool = False
    y_range: tuple[float, float] | None = None
    x_step: float | None = None
    guides: Sequence[float] = ()

    def log_range(self) -> tuple[float, float] | None:
        """The ends of a log axis: `y_range`, or what holds all positive values; None where there is none."""
        if self.y_range is not None:
            return self.y_range
        values = np.concatenate([series.y for series in self.series])
        values = values[np.isfinite(values) & (values > 0)]
        if not values.size:
            return None
        margin = max((values.max() / values.min()) ** 0.05, 1.05)
        return float(values.min() / margin), float(values.max() * margin)


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
    def is_still(self) -> bool:
        """Whether it is made of images, which a page shows as a file: interactive ones would weigh megabytes."""
        return any(isinstance(series, Image) for panel in self.panels for series in panel.series)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of panels."""
        columns = min(self.columns, len(self.panels))
        return -(-len(self.panels) // columns), columns
