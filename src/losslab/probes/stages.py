"""One progress count over the stages of a measurement."""

from collections.abc import Mapping

from losslab.status import Progress


class Stages:
    """What a probe of several parts reports: each part moves the whole by its share.

    Args:
        progress: Told (done, total of all shares, note); None: nobody.
        shares: Each stage's cost, in any one unit, in the order in which they are made.
    """

    def __init__(self, progress: Progress | None, shares: Mapping[str, float]):
        self._progress, self._shares = progress, dict(shares)

    def stage(self, name: str, expected: float | None = None) -> Progress | None:
        """The progress of one stage; `expected` in place of the total that it is told, where that is only a limit."""
        if self._progress is None:
            return None
        tell, names, total = self._progress, list(self._shares), sum(self._shares.values())
        start = sum(self._shares[before] for before in names[: names.index(name)])

        def tick(done: float, limit: float, note: str) -> None:
            tell(start + self._shares[name] * min(done / (expected or limit), 1.0), total, note)

        return tick
