"""What a run folder or a study folder holds: what an interrupted run never wrote is simply absent."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from losslab.studies.record import RunFolder, run_folders

SERIES = ("feature_maps", "attention_maps")  # of these all records are shown: how the network came about
PROBES = ("spectrum", "sharpness", "plane", "noise")  # what a complete run has; others are shown where they are


@dataclass(frozen=True)
class Run:
    """One run's files: the last row of each epoch, the final row, the latest record of each probe.

    `homotopy` are the rows of the homotopy learning rate, in the order of their steps.

    `series` holds all records of the probes in SERIES, in the order of their steps.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    homotopy: list[dict[str, Any]] = field(default_factory=list)
    final: dict[str, Any] | None = None
    probes: dict[str, dict[str, Any]] = field(default_factory=dict)
    series: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def get(self, dotted: str) -> Any:
        """A probe's value by its dotted name ("spectrum.trace.value"), None where the folder lacks it."""
        return get(self.probes, dotted)

    def array(self, dotted: str) -> np.ndarray:
        """A probe's array of floats, empty where the folder lacks it."""
        return _floats(self.get(dotted))


@dataclass(frozen=True)
class Pair:
    """What was measured between two runs: the record of each probe of two solutions."""

    first: str
    second: str
    probes: dict[str, dict[str, Any]]

    @property
    def name(self) -> str:
        """Both runs' names, as a legend writes them."""
        return f"{self.first} → {self.second}"

    def get(self, dotted: str) -> Any:
        """A probe's value by its dotted name ("interpolation.barrier"), None where the folder lacks it."""
        return get(self.probes, dotted)

    def array(self, dotted: str) -> np.ndarray:
        """A probe's array of floats, empty where the folder lacks it."""
        return _floats(self.get(dotted))


@dataclass(frozen=True)
class Contents:
    """All that a report is made from."""

    name: str
    runs: list[Run]
    pairs: list[Pair]
    is_study: bool


def get(tree: Any, dotted: str) -> Any:
    """The value under a dotted name in a tree of dicts, None where a part is missing."""
    for key in dotted.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _floats(value: Any) -> np.ndarray:
    return np.asarray(() if value is None else value, dtype=float)


def read(folder: str | Path) -> Contents:
    """Read a run folder, or a study folder with all its runs.

    Raises:
        FileNotFoundError: If the folder is neither.
    """
    path = Path(folder)
    name = path.resolve().name
    if RunFolder(path).is_run():
        return Contents(name, [_run(name, RunFolder(path))], [], is_study=False)
    runs = [_run(run, inside) for run, inside in run_folders(path).items()]
    return Contents(name, runs, _pairs(RunFolder(path), [run.name for run in runs]), is_study=True)


def _run(name: str, folder: RunFolder) -> Run:
    rows = folder.metrics()
    # A run that went on from a checkpoint may have logged an epoch twice: the later row counts.
    epochs = {row["epoch"]: row for row in rows if row.get("kind") == "epoch" and "epoch" in row}
    measured = folder.probes()
    return Run(
        name,
        config=folder.config,
        environment=folder.environment if (folder.path / "environment.json").is_file() else {},
        epochs=[epochs[epoch] for epoch in sorted(epochs)],
        homotopy=[row for row in rows if row.get("kind") == "homotopy"],
        final=next((row for row in reversed(rows) if row.get("kind") == "final"), None),
        probes={probe: folder.read_probe(probe) for probe in measured if probe not in SERIES},
        series={name: [folder.read_probe(name, label) for label in measured.get(name, ())] for name in SERIES},
    )


def _pairs(study: RunFolder, names: Iterable[str]) -> list[Pair]:
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for probe, labels in study.probes().items():
        for label in labels:
            found.setdefault(label, {})[probe] = study.read_probe(probe, label)
    return [Pair(*_split(label, set(names)), found[label]) for label in sorted(found)]


def _split(label: str, names: set[str]) -> tuple[str, str]:
    """The two runs in "a--b", also where a run's name holds "--" itself."""
    parts = label.split("--")
    ways = [("--".join(parts[:cut]), "--".join(parts[cut:])) for cut in range(1, len(parts))]
    return next((way for way in ways if names.issuperset(way)), ways[0] if ways else (label, label))
