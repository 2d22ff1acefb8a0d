"""What TALT's diagnostics left in a run folder: for each tensor its samples, in the order of their steps."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from losslab.studies.record import RunFolder

KIND = "talt"  # of the rows in metrics.jsonl


@dataclass(frozen=True)
class Watched:
    """A run by TALT.

    Attributes:
        name: The run's.
        tensors: Samples by tensor, as `losslab.optim.diagnostics.TALTSample` names their numbers, and the run's step.
        steps: Of all samples.
        spreads: How far the tensors' scales lie apart: the gradients', and the updates'.
        config: The run's.
    """

    name: str
    tensors: dict[str, list[dict[str, Any]]]
    steps: np.ndarray
    spreads: dict[str, np.ndarray]
    config: dict[str, Any]

    def line(self, tensor: str, key: str) -> tuple[np.ndarray, np.ndarray]:
        """The steps and a number of a tensor at each, NaN where it has none."""
        samples = self.tensors[tensor]
        values = [math.nan if sample.get(key) is None else float(sample[key]) for sample in samples]
        return np.array([sample["step"] for sample in samples], dtype=float), np.array(values)

    def series(self, tensor: str, key: str) -> tuple[np.ndarray, np.ndarray]:
        """The steps (S,) at which a tensor has a series of numbers, and these (S, ·)."""
        having = [sample for sample in self.tensors[tensor] if sample.get(key)]
        steps = np.array([sample["step"] for sample in having], dtype=float)
        return steps, np.array([sample[key] for sample in having])

    def largest(self, count: int) -> list[str]:
        """The tensors with the most numbers, in the network's order."""
        sizes = {name: math.prod(samples[-1]["shape"]) for name, samples in self.tensors.items()}
        chosen = sorted(sizes, key=lambda name: -sizes[name])[:count]
        return [name for name in sizes if name in chosen]


def is_watched(folder: str | Path) -> bool:
    """Whether there are samples of TALT's in a run folder."""
    return RunFolder(folder).is_run() and any(row.get("kind") == KIND for row in RunFolder(folder).metrics())


def read(folder: str | Path) -> Watched:
    """Read a run folder.

    Raises:
        FileNotFoundError: If it is none, or holds no samples.
    """
    run = RunFolder.open(folder)
    rows = [row for row in run.metrics() if row.get("kind") == KIND]
    if not rows:
        raise FileNotFoundError(
            f"{folder}: no samples of TALT; expected a run with training.monitor_talt, or --monitor-theoretical-fixes"
        )
    tensors: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        for name, values in row["tensors"].items():
            tensors.setdefault(name, []).append({**values, "step": row["step"]})
    spreads = {
        name: np.array([row.get(f"{name}_spread", math.nan) for row in rows], dtype=float)
        for name in ("gradient", "update")
    }
    steps = np.array([row["step"] for row in rows], dtype=float)
    return Watched(run.path.resolve().name, tensors, steps, spreads, run.config)
