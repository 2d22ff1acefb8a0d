"""A percentile of all numbers seen so far, or of the last ones."""

import bisect
import math
from typing import Any

import numpy as np


class WindowedPercentile:
    """Of the last `window` numbers, exactly; by linear interpolation between two of them.

    Args:
        level: From 0 to 1.
        window: How many are remembered; None: all of them.

    >>> found = WindowedPercentile(0.5, window=3)
    >>> for number in (9.0, 1.0, 2.0, 3.0):
    ...     found.add(number)
    >>> found.value
    2.0
    """

    def __init__(self, level: float, window: int | None = None) -> None:
        self.level, self.window, self.numbers = level, window, list[float]()

    def add(self, number: float) -> None:
        """Take one more into account."""
        self.numbers.append(number)
        if self.window is not None:
            del self.numbers[: -self.window]

    @property
    def value(self) -> float:
        """NaN before the first number."""
        return float(np.quantile(self.numbers, self.level)) if self.numbers else math.nan

    def state_dict(self) -> dict[str, Any]:
        """What has been seen."""
        return {"numbers": list(self.numbers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.numbers = list(state["numbers"])


class P2Percentile:
    """Of all numbers ever seen, nearly, from five of them: the P² algorithm (Jain & Chlamtac 1985).

    Five markers follow the smallest, the largest, the percentile and the middles beside it; each moves along a parabola
    through its neighbours when it is a whole place away from where it belongs.

    Args:
        level: From 0 to 1.
    """

    def __init__(self, level: float) -> None:
        self.level, self.count = level, 0
        self.heights, self.places = list[float](), [0.0, 1.0, 2.0, 3.0, 4.0]

    def add(self, number: float) -> None:
        """Take one more into account."""
        self.count += 1
        if self.count <= 5:
            bisect.insort(self.heights, number)
            return
        q, n = self.heights, self.places
        q[0], q[4] = min(q[0], number), max(q[4], number)
        cell = min(max(bisect.bisect_right(q, number) - 1, 0), 3)
        for i in range(cell + 1, 5):
            n[i] += 1
        for i, share in enumerate((self.level / 2, self.level, (1 + self.level) / 2), start=1):
            away = share * (self.count - 1) - n[i]
            if (away >= 1 and n[i + 1] - n[i] > 1) or (away <= -1 and n[i - 1] - n[i] < -1):
                self._move(i, math.copysign(1.0, away))

    def _move(self, i: int, by: float) -> None:
        q, n = self.heights, self.places
        right, left = (q[i + 1] - q[i]) / (n[i + 1] - n[i]), (q[i] - q[i - 1]) / (n[i] - n[i - 1])
        curve = ((n[i] - n[i - 1] + by) * right + (n[i + 1] - n[i] - by) * left) / (n[i + 1] - n[i - 1])
        height = q[i] + by * curve
        if not q[i - 1] < height < q[i + 1]:  # then along the straight line
            height = q[i] + (right if by > 0 else -left)
        q[i] = height
        n[i] += by

    @property
    def value(self) -> float:
        """NaN before the first number; exact up to the fifth."""
        if self.count <= 5:
            return float(np.quantile(self.heights, self.level)) if self.heights else math.nan
        return self.heights[2]

    def state_dict(self) -> dict[str, Any]:
        """The markers."""
        return {"count": self.count, "heights": list(self.heights), "places": list(self.places)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.count, self.heights, self.places = state["count"], list(state["heights"]), list(state["places"])
