"""A training on a terminal: where it is, how well it does, how fast it goes."""

import time
from collections.abc import Callable
from typing import Any

from losslab.cli.terminal import Tick

REFRESH = 0.1  # seconds between two texts: nobody reads faster, and a step may take a millisecond


class LiveTraining:
    """A sink and a `Tick` in one: it knows the rows, and tells a bar after each step.

    Args:
        bar: Told the steps done and in all, and a text; None: nobody.
        batch_size: Examples in a step.
        epochs: Passes over the data in all.
        clock: Seconds, from any start.
    """

    def __init__(
        self, bar: Tick | None, *, batch_size: int, epochs: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.bar, self.batch_size, self.epochs, self.clock = bar, batch_size, epochs, clock
        self.row: dict[str, Any] = {}
        self._first: tuple[float, float] | None = None  # (steps, time) at the first tick
        self._shown = -REFRESH

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Remember a row of the metrics."""
        del step
        if values.get("kind") == "epoch":
            self.row = values

    def __call__(self, done: float, total: float, note: str) -> None:
        """Tell the bar."""
        now = self.clock()
        self._first = self._first or (done, now)
        if self.bar is None or (done < total and now - self._shown < REFRESH):
            return
        self._shown = now
        self.bar(done, total, self._text(done, total, now, note))

    def _text(self, done: float, total: float, now: float, note: str) -> str:
        assert self._first is not None
        epoch = min(int(self.row.get("epoch", 0)) + 1, self.epochs)
        parts = [f"epoch {epoch}/{self.epochs}", f"step {done:g}/{total:g}"]
        if self.row:
            parts.append(f"loss {self.row['train_loss']:.4g}")
            parts.append(f"accuracy {self.row['validation_accuracy']:.1%}")
            parts.append(f"lr {self.row['learning_rate']:.3g}")
        elif note:
            parts.append(note)
        if now > self._first[1]:
            parts.append(f"{(done - self._first[0]) * self.batch_size / (now - self._first[1]):,.0f} samples/s")
        return "  ".join(parts)
