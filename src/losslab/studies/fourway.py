"""The four-way study: several optimizers on one task, six probes, every pair connected, in one command.

Train each configuration; at each solution the spectrum, the noise, a perturbation and training in a small subspace;
between each two the straight line and an elastic band. What is there already is kept, so an interrupted study goes on.
"""

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from losslab.operators.risk import EmpiricalRisk
from losslab.status import Progress, Stages
from losslab.studies import seed_files
from losslab.studies.analysis import trained
from losslab.studies.data import Batches
from losslab.studies.probing import find_probe, label_of, measure, risk_of
from losslab.studies.record import RunFolder
from losslab.studies.runs import LoadedRun, load_run
from losslab.studies.sections import RunConfig

Settings = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class FourWay:
    """What is measured, and how.

    Attributes:
        solutions: Settings of each probe of one solution, in the order of measuring.
        pairs: Settings of each probe of two.
    """

    solutions: Settings = field(
        default_factory=lambda: {
            "spectrum": {"k": 3},
            "noise": {},
            "perturbation": {},
            "intrinsic_dimension": {"dimension": 15, "num_seeds": 1},
        }
    )
    pairs: Settings = field(
        default_factory=lambda: {"interpolation": {"steps": 41}, "elastic_band": {"num_nodes": 5, "steps": 20}}
    )


def fourway(
    folder: str | Path,
    configs: Sequence[RunConfig],
    plan: FourWay | None = None,
    *,
    progress: Progress | None = None,
) -> Path:
    """Train, probe and connect; write losslab's records and the files of the founding study beside them.

    Each solution is connected to the next one, and the last to the first.

    Args:
        folder: The study folder: a run folder for each configuration, by its name.
        configs: What to train; their seeds are the probes' seeds too.
        plan: What to measure.
        progress: Called with the stages done (and the part of the present one), how many there are, and what goes on.

    Returns:
        The study folder.

    Raises:
        ValueError: Two configurations of one name, or a run of another configuration is there.
        FileExistsError: Something that is no run is there.
    """
    names = [config.name for config in configs]
    if len(set(names)) < len(names):
        raise ValueError(f"configs: expected different names, got {', '.join(names)}; set each one's name")
    plan, study = plan or FourWay(), RunFolder(folder)
    couples = [] if len(names) < 2 else list(itertools.pairwise([*names, names[0]] if len(names) > 2 else names))
    stages = Stages(progress, len(configs) * (1 + len(plan.solutions)) + len(couples) * len(plan.pairs))
    runs: dict[str, LoadedRun] = {}
    for config in configs:
        runs[config.name] = load_run(trained(config, study.path / config.name, stages.stage(name=config.name)).path)
    for name, run in runs.items():
        for probe, settings in plan.solutions.items():
            risk = _whole_training_split if probe == "intrinsic_dimension" else risk_of
            _measured(probe, settings, run, None, stages.stage(name=f"{name}: {probe}"), risk)
        seed_files.write_solution(run.folder, run.config.seed)
    for first, second in couples:
        for probe, settings in plan.pairs.items():
            tick = stages.stage(name=f"{first}, {second}: {probe}")
            _measured(probe, settings, runs[first], runs[second], tick, risk_of)
        seed_files.write_pair(study, runs[first].folder, first, second)
    return study.path


def _measured(
    name: str,
    settings: Mapping[str, Any],
    run: LoadedRun,
    other: LoadedRun | None,
    tick: Progress | None,
    risk: Callable[[LoadedRun], EmpiricalRisk],
) -> None:
    """Measure, unless the record is there."""
    probe = find_probe(name)
    folder, label = label_of(run, other)
    if label not in folder.probes().get(name, []):
        takes_seed = "seed" in inspect.signature(probe.measure).parameters
        seeded = {"seed": run.config.seed, **settings} if takes_seed else settings
        measure(probe, run, other, settings=seeded, risk=risk(run), progress=tick)


def _whole_training_split(run: LoadedRun) -> EmpiricalRisk:
    """The data that training in a subspace trains on: those that the network was trained on, in its batches."""
    batches = Batches(run.dataset.train, run.config.dataset.batch_size)
    return EmpiricalRisk(run.model, nn.CrossEntropyLoss(), list(batches), mode="train", check=False)
