"""The main job, from nothing to a report's worth of records: three optimizers, their solutions, what lies between."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from losslab.status import Progress, Stages
from losslab.studies.config import load_config
from losslab.studies.probing import find_probe, measure, risk_of
from losslab.studies.record import RunFolder
from losslab.studies.runs import LoadedRun, load_run
from losslab.studies.shipped import shipped_configs
from losslab.studies.train import train

RUNS = ("sgd", "sgd_momentum", "adamw")
MARKER = "demo.txt"  # a folder without it is not the demo's to replace


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
        default_factory=lambda: {"train": 9, "spectrum": 12, "sharpness": 2, "plane": 5, "noise": 3, "interpolation": 1}
    )


QUICK = DemoSettings(
    overrides=(
        "training.epochs=8",
        "model.width=16",
        "schedule.warmup_steps=34",
        "probes.examples=128",
        "probes.batch_size=128",
    ),
    probes={
        "spectrum": {"k": 5, "tol": 1e-2, "num_nodes": 30, "num_probes": 2, "trace_tol": 0.1, "trace_samples": 16},
        "sharpness": {"num_samples": 10},
        "plane": {"resolution": 9},
        "noise": {"tol": 1e-2},
    },
    weights={"train": 2, "spectrum": 1, "sharpness": 0.3, "plane": 0.3, "noise": 0.4, "interpolation": 0.2},
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
    marker = Path(folder) / MARKER
    study = RunFolder.create(folder, overwrite=marker.is_file())
    marker.write_text("Made by `losslab demo`, which will replace it when it is run here again.\n", encoding="utf-8")
    stages = Stages(progress, _total(settings))

    def stage(kind: str, name: str) -> Progress | None:
        return stages.stage(settings.weights[kind], name=f"{name}: {kind}")

    runs: dict[str, LoadedRun] = {}
    for name in RUNS:
        config = load_config(shipped_configs()[name], settings.overrides)
        run_folder = RunFolder.create(study.path / name, overwrite=True)
        train(config, run_folder, progress=stage("train", name))
        runs[name] = load_run(run_folder.path)
    for name, run in runs.items():
        risk = risk_of(run)
        for probe, options in settings.probes.items():
            measure(find_probe(probe), run, settings=options, risk=risk, progress=stage(probe, name))
    for a, b in itertools.combinations(runs, 2):
        measure(find_probe("interpolation"), runs[a], runs[b], progress=stage("interpolation", f"{a}, {b}"))
    return study.path


def _total(settings: DemoSettings) -> float:
    """The whole demo's estimated seconds."""
    weights, pairs = settings.weights, len(RUNS) * (len(RUNS) - 1) // 2
    each = weights["train"] + sum(weights[probe] for probe in settings.probes)
    return len(RUNS) * each + pairs * weights["interpolation"]
