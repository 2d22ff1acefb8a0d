"""What a solver may spend, what it has spent, and whom it tells on the way."""

import time
from collections.abc import Callable

from losslab.ranks import ALONE, Ranks
from losslab.status import Progress, Status, StopRequested


class Budget:
    """Products and seconds, counted down by a solver.

    Args:
        max_matvecs: Products at most.
        time_budget: Seconds at most, from now; None: no limit. One product is always made.
        progress: Called after each `spend`. When it raises `StopRequested`, the solver ends with what it has.
        expected: The total that `progress` is told; default `max_matvecs`.
        ranks: With several processes the time is over for all of them together.

    >>> budget = Budget(2)
    >>> budget.spend(1), budget.stop(), budget.spend(1), str(budget.stop())
    (None, None, None, 'budget_reached')
    """

    def __init__(
        self,
        max_matvecs: int,
        time_budget: float | None = None,
        progress: Progress | None = None,
        *,
        expected: int | None = None,
        ranks: Ranks = ALONE,
    ):
        if max_matvecs < 1:
            raise ValueError(f"max_matvecs: expected at least 1, got {max_matvecs}")
        if time_budget is not None and not time_budget > 0:
            raise ValueError(f"time_budget: expected seconds > 0 or None, got {time_budget!r}")
        self.max_matvecs, self.used = max_matvecs, 0
        self._expected, self._progress, self._ranks = expected or max_matvecs, progress, ranks
        self._deadline = None if time_budget is None else time.monotonic() + time_budget
        self._stopped = False

    @property
    def left(self) -> int:
        """Products that may still be made."""
        return max(self.max_matvecs - self.used, 0)

    def allow(self, matvecs: int) -> None:
        """Let the next stage make so many products."""
        self.max_matvecs = self.used + matvecs

    def stop(self) -> Status | None:
        """Why no further product may be made; None if one may."""
        if self._ranks.any(self._stopped):
            return Status.stopped
        if self.used >= self.max_matvecs:
            return Status.budget_reached
        if self._deadline is not None and self.used and self._ranks.any(time.monotonic() > self._deadline):
            return Status.time_reached
        return None

    def spend(self, matvecs: int, note: str | Callable[[], str] = "") -> None:
        """Count products that were made; `note` says what is known so far, and is asked only where somebody listens."""
        self.used += matvecs
        if self._progress is not None:
            try:
                said = note if isinstance(note, str) else note()
                self._progress(min(self.used, self._expected), self._expected, said)
            except StopRequested:
                self._stopped = True
