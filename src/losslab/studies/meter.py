"""One progress count over the stages of a long job."""

from losslab.status import Progress


class Meter:
    """So many stages of equal length.

    Args:
        total: How many stages.
        progress: Called with the stages done (and the part of the present one), `total`, and what goes on.
    """

    def __init__(self, total: int, progress: Progress | None):
        self._total, self._progress, self._done = total, progress, 0

    def stage(self, note: str) -> Progress:
        """The next stage's progress."""
        start = self._done
        self._done += 1

        def tick(done: float, total: float, detail: str) -> None:
            if self._progress is not None:
                share = min(done / total, 1.0) if total else 0.0
                self._progress(start + share, self._total, f"{note}  {detail}")

        tick(0, 1, "")
        return tick
