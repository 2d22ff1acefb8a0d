"""Why a computation stopped, and how it reports on its way.

A number that did not converge cannot look like one that did.
"""

from collections.abc import Callable
from enum import Enum

# progress(done, total, note): called now and then by long computations; `note` says what is known so far.
Progress = Callable[[float, float, str], None]


class StopRequested(Exception):
    """Raised by a progress callback: end here, with a result of what is known so far."""


class Stages:
    """One progress count over the parts of a long computation, which are made one after another.

    Args:
        progress: Told (done, total, note); None: nobody.
        total: Of all shares: each part's cost, in any one unit.
    """

    def __init__(self, progress: Progress | None, total: float):
        self._progress, self._total, self._next = progress, total, 0.0

    def stage(self, share: float = 1.0, *, name: str = "", expected: float | None = None) -> Progress | None:
        """The next part's progress.

        Args:
            share: By how much it moves the whole.
            name: Is told now, and before each of the part's notes.
            expected: Takes the place of the total that the part tells, where that is only a limit.
        """
        start, self._next = self._next, self._next + share
        if self._progress is None:
            return None
        tell = self._progress

        def tick(done: float, limit: float, note: str) -> None:
            of = expected or limit
            tell(start + share * (min(done / of, 1.0) if of else 0.0), self._total, f"{name}  {note}" if name else note)

        if name:
            tick(0, 1, "")
        return tick


class Status(str, Enum):
    """Why a computation stopped, from the most to the least trustworthy. The value is the name in files.

    >>> Status.converged.ok, Status.budget_reached.ok
    (True, False)
    >>> print(Status.breakdown.message)
    an invariant subspace was found: the values are exact
    """

    complete = "complete"
    breakdown = "breakdown"
    converged = "converged"
    stagnated = "stagnated"
    budget_reached = "budget_reached"
    time_reached = "time_reached"
    stopped = "stopped"
    indefinite = "indefinite"
    nonfinite = "nonfinite"

    @property
    def message(self) -> str:
        """One sentence on what happened and, where something can be done about it, what."""
        return _MESSAGES[self]

    @property
    def ok(self) -> bool:
        """Whether the number can be taken at its stated error."""
        return self in (Status.complete, Status.breakdown, Status.converged)

    def __str__(self) -> str:
        return self.value


_MESSAGES = {
    Status.complete: "everything that was asked for was computed",
    Status.converged: "the requested tolerance was reached",
    Status.breakdown: "an invariant subspace was found: the values are exact",
    Status.stagnated: "rounding lets the residual fall no further: read it, or compute in float64",
    Status.budget_reached: "the budget of products was used up first: read the errors, or raise max_matvecs",
    Status.time_reached: "the time budget was used up first: read the errors, or raise time_budget",
    Status.stopped: "it was told to stop: these are the numbers known by then, read the errors",
    Status.indefinite: "a direction of zero or negative curvature was met, where there must be none: raise the shift",
    Status.nonfinite: "NaN or Inf appeared in a product: check the loss and its derivatives at this point",
}


def worst(*statuses: Status) -> Status:
    """The least trustworthy of several statuses: a result is as good as its weakest part."""
    order = list(Status)
    return max(statuses, key=order.index)
