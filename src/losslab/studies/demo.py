"""The main job, from nothing to a report's worth of records: three optimizers, their solutions, what lies between."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from losslab.status import Progress
from losslab.studies.config import load_config
from losslab.studies.probing import find_probe, measure, risk_of
from losslab.studies.record import RunFolder
from losslab.studies.shipped import shipped_configs
from losslab.studies.train import LoadedRun, load_run, train

RUNS = ("sgd", "sgd_momentum", "adamw")


@dataclass(frozen=True)
class DemoSettings:
    """How much work.

    Attributes:
        overrides: Changes to the shipped configurations.
        probes: Each probe's settings, in the order of measuring.
        weights: Seconds that a stage takes on two cores, measured; they only drive the progress bar.
    """

    overrides: tuple[str, ...] = ("probes.examples=1024", "probes.batch_size=512")
    probes: Mapping[str, Mapping[str, Any]] = field(
        default_factory=lambda: {
            "spectrum": {"k": 5, "trace_tol": 0.02, "trace_samples": 48},
            "sharpness": {"num_samples": 50},
            "plane": {"resolution": 21},
            "noise": {},
        }
    )
    weights: Mapping[str, float] = field(
        default_factory=lambda: {"train": 9, "spectrum": 12, "sharpness": 1, "plane": 5, "noise": 2, "interpolation": 1}
    )


QUICK = DemoSettings(
    overrides=("training.epochs=4", "model.width=8", "probes.examples=128", "probes.batch_size=128"),
    probes={
        "spectrum": {"k": 5, "num_nodes": 30, "num_probes": 2, "max_matvecs": 60, "trace_tol": 0.05, "trace_samples": 16},
        "sharpness": {"num_samples": 10},
        "plane": {"resolution": 9},
        "noise": {"tol": 1e-2},
    },
    weights={"train": 2, "spectrum": 1, "sharpness": 0.1, "plane": 0.3, "noise": 0.3, "interpolation": 0.2},
)


def demo(folder: str | Path, settings: DemoSettings | None = None, *, progress: Progress | None = None) -> Path:
    """Train the shipped configurations on the embedded digits, probe each solution, interpolate between each pair.

    Args:
        folder: The study folder; an earlier demo there is replaced.
        settings: How much work; default the full demo.
        progress: Called with the work done and in all, in estimated seconds, and what is going on.

    Returns:
        The study folder. Ctrl-C leaves what is there, which a report can be made of.

    Raises:
        FileExistsError: The folder holds something else than an earlier demo.
    """
    settings = settings or DemoSettings()
    was_demo = any(RunFolder(Path(folder) / name).is_run() for name in RUNS)
    study = RunFolder.create(folder, overwrite=was_demo)
    meter = _Meter(settings, progress)
    runs: dict[str, LoadedRun] = {}
    for name in RUNS:
        config = load_config(shipped_configs()[name], settings.overrides)
        run_folder = RunFolder.create(study.path / name, overwrite=True)
        meter.stage("train", name, lambda tick, c=config, f=run_folder: train(c, f, progress=tick))
        runs[name] = load_run(run_folder.path)
    for name, run in runs.items():
        risk = risk_of(run)
        for probe, options in settings.probes.items():
            row = find_probe(probe)
            meter.stage(probe, name, lambda tick: measure(row, run, settings=options, risk=risk, progress=tick))  # noqa: B023
    interpolation = find_probe("interpolation")
    for a, b in itertools.combinations(runs, 2):
        meter.stage("interpolation", f"{a} – {b}", lambda tick: measure(interpolation, runs[a], runs[b], progress=tick))  # noqa: B023
    return study.path


class _Meter:
    """One progress count over all stages, in estimated seconds."""

    def __init__(self, settings: DemoSettings, progress: Progress | None):
        pairs = len(RUNS) * (len(RUNS) - 1) // 2
        weights = settings.weights
        self._total = len(RUNS) * (weights["train"] + sum(weights[p] for p in settings.probes)) + pairs * weights["interpolation"]
        self._weights, self._progress, self._before = weights, progress, 0.0

    def stage(self, kind: str, name: str, work: Callable[[Progress], Any]) -> None:
        """Run one stage; its own progress moves the whole by the stage's weight."""
        weight = self._weights[kind]

        def tick(done: float, total: float, note: str) -> None:
            if self._progress is not None:
                share = min(done / total, 1.0) if total else 0.0
                self._progress(self._before + weight * share, self._total, f"{name}: {kind}  {note}")

        tick(0, 1, "")
        work(tick)
        self._before += weight
        tick(0, 1, "")
