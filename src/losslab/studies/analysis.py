"""One network, from a name to its landscape: train it, then measure what was asked for."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from losslab.probes.base import ProbeResult
from losslab.probes.spectrum import SpectrumOptions
from losslab.status import Progress, Stages
from losslab.studies.data import load_dataset
from losslab.studies.probing import find_probe, measure, risk_of
from losslab.studies.record import RunFolder
from losslab.studies.runs import load_run
from losslab.studies.sections import RunConfig
from losslab.studies.train import train

SNAPSHOTS = 20  # along a tracked training, about
EIGENVALUES = 20  # at each end


@dataclass(frozen=True)
class Analysis:
    """Which questions are asked beside the sharpness.

    Attributes:
        hessian: The spectrum, 20 eigenvalues at each end.
        visualize: The plane.
        trajectory: The way there: snapshots while it trains.
        settings: Changes to the probes' settings, by probe.
    """

    hessian: bool = False
    visualize: bool = False
    trajectory: bool = False
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def probes(self) -> dict[str, dict[str, Any]]:
        """The probes and their settings."""
        wanted: dict[str, dict[str, Any]] = {"sharpness": {}}
        if self.hessian:
            wanted["spectrum"] = {"k": EIGENVALUES, **dataclasses.asdict(SpectrumOptions.many(EIGENVALUES))}
        if self.visualize:
            wanted["plane"] = {"resolution": 31}
        if self.trajectory:
            wanted["trajectory"] = {}
        return {name: options | dict(self.settings.get(name, {})) for name, options in wanted.items()}


def analyze(
    config: RunConfig, path: str | Path, analysis: Analysis | None = None, *, progress: Progress | None = None
) -> dict[str, ProbeResult]:
    """What does the loss look like where this network ends up?

    Args:
        config: What to train. With `trajectory` about 20 snapshots are kept, unless the configuration asks for others.
        path: The run folder; a finished run of the same configuration is taken as it is.
        analysis: What to measure.
        progress: Called with the stages done, how many there are, and what goes on.

    Returns:
        The results by probe. They are in the run folder too.

    Raises:
        FileExistsError: Something else is in the folder.
    """
    analysis = analysis or Analysis()
    wanted = analysis.probes()
    stages = Stages(progress, 1 + len(wanted))
    config = _with_snapshots(config) if analysis.trajectory else config
    run = load_run(trained(config, path, stages.stage(name="training")).path)
    risk = risk_of(run)
    results = {}
    for name, settings in wanted.items():
        results[name] = measure(find_probe(name), run, settings=settings, risk=risk, progress=stages.stage(name=name))
    return results


def trained(config: RunConfig, path: str | Path, tick: Progress | None) -> RunFolder:
    """The finished run of this configuration in that folder, trained now, before, or in part before.

    Raises:
        FileExistsError: Something that is no run is in the folder.
        ValueError: A run of another configuration is there.
    """
    folder = RunFolder(path)
    return train(config, folder if folder.is_run() else RunFolder.create(path), progress=tick, resume=True)


def _with_snapshots(config: RunConfig) -> RunConfig:
    training = config.training
    if training.snapshots.every or training.snapshots.steps:
        return config
    epoch = math.ceil(len(load_dataset(config.dataset).train) / config.dataset.batch_size)
    steps = training.max_steps or training.epochs * epoch
    snapshots = training.snapshots.model_copy(update={"every": max(steps // SNAPSHOTS, 1)})
    return config.model_copy(update={"training": training.model_copy(update={"snapshots": snapshots})})
