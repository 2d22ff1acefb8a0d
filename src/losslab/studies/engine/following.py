"""How far several runs have come, read from their folders."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from losslab.records import decode
from losslab.status import Progress
from losslab.studies.engine.jobs import Standing

PERIOD = 0.5  # seconds between two looks
_TAIL = 1 << 14  # bytes that hold the last row for sure


@dataclass(frozen=True)
class RunRow:
    """One run in the table of all.

    Attributes:
        name: The run's.
        state: "waiting", "running", "finished", "failed", "skipped" or "stopped".
        attempts: How often it was started.
        done: Share of its training that is done, by the last evaluation.
        error: One line, where it failed.
        values: The last row of its metrics.
    """

    name: str
    state: str
    attempts: int
    done: float
    error: str | None
    values: dict[str, Any]


Table = Callable[[Sequence[RunRow]], None]


class Follower:
    """Tells how far all runs are, to `progress` as one number, to `table` as a row each.

    Either may raise `StopRequested`.
    """

    def __init__(self, standings: Sequence[Standing], progress: Progress | None, table: Table | None) -> None:
        self._standings, self._progress, self._table = standings, progress, table
        self._next = 0.0

    def tell(self, *, now: bool = False) -> None:
        """Look and tell, if it is time to."""
        if (self._progress is None and self._table is None) or (time.monotonic() < self._next and not now):
            return
        rows = [_row(standing) for standing in self._standings]
        self._next = time.monotonic() + PERIOD
        if self._table is not None:
            self._table(rows)
        if self._progress is not None:
            self._progress(sum(row.done for row in rows), len(rows), _note(rows))


def last_row(folder: Path) -> dict[str, Any]:
    """The last whole row of a run's metrics; empty where there is none."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            file.seek(max(file.seek(0, 2) - _TAIL, 0))
            *lines, _torn = file.read().split(b"\n")
        return decode(json.loads(lines[-1])) if lines else {}
    except (FileNotFoundError, ValueError):
        return {}


def _row(standing: Standing) -> RunRow:
    values, training = last_row(standing.job.folder), standing.job.config.training
    if standing.state in ("finished", "skipped", "failed") or values.get("kind") == "final":
        done = 1.0
    else:
        shares = [values.get("epoch", 0) / training.epochs]
        shares += [values.get("step", 0) / training.max_steps] if training.max_steps else []
        done = min(max(shares), 1.0)
    return RunRow(standing.job.name, standing.state, standing.attempts, done, standing.error, values)


def _note(rows: Sequence[RunRow]) -> str:
    states = [row.state for row in rows]
    counts = [(state, states.count(state)) for state in dict.fromkeys(states)]
    return ", ".join(f"{count} {state}" for state, count in counts)
