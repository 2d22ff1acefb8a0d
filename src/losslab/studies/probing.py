"""Probes on run folders: load the solution, measure, write the record where reports look for it."""

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from losslab.operators.risk import EmpiricalRisk
from losslab.probes import PROBES
from losslab.probes.base import Probe, ProbeResult
from losslab.probes.plan import Plan, plan
from losslab.ranks import ALONE, Ranks
from losslab.status import Progress
from losslab.studies import checkpoint
from losslab.studies.record import RunFolder
from losslab.studies.runs import LoadedRun, load_run, probe_batches
from losslab.studies.section import suggestion

SPLITS = ("validation", "test")  # arguments of probes that are risks on these splits
_ON_A_PATH = {"pca", "eigenvectors"}  # directions that a path can be seen on: random ones see nothing of it
FROM_RUN = (*SPLITS, "snapshots", "trajectory", "ranks")  # arguments of probes that a run, or its processes, give


def risk_of(run: LoadedRun, *, split: str | None = None, ranks: Ranks = ALONE, **options: Any) -> EmpiricalRisk:
    """The run's loss as a function of its parameters, on the examples that its configuration sets aside for probes.

    As many of another split's first examples with `split`. Of several processes each takes every so-manieth batch.
    `options` are EmpiricalRisk's.
    """
    batches = list(probe_batches(run, split))[ranks.rank :: ranks.count]
    return EmpiricalRisk(run.model, nn.CrossEntropyLoss(), batches, ranks=ranks, **options)


def shares_points(probe: Probe) -> bool:
    """Whether several processes share this probe's points, each with all the data, instead of the data."""
    return "ranks" in inspect.signature(probe.measure).parameters


def find_probe(name: str) -> Probe:
    """A row of PROBES.

    Raises:
        ValueError: There is none of that name; the nearest is suggested.
    """
    if name not in PROBES:
        raise ValueError(f"probe: unknown name {name!r}, {suggestion(name, PROBES)}")
    return PROBES[name]


def measure(
    probe: Probe,
    run: LoadedRun,
    other: LoadedRun | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    risk: EmpiricalRisk | None = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> ProbeResult:
    """Measure at a run's solution (or between two runs') and write the record.

    The record goes to `<run>/probes/<probe>/<step>`; between two runs of one study to
    `<study>/probes/<probe>/<run>--<other>`, between others to the first run's folder.

    Args:
        probe: A row of PROBES.
        run: The solution.
        other: The second one, for probes of two.
        settings: The probe's keyword arguments.
        risk: A risk made before, to share its data.
        progress: Passed to the probe.
        ranks: The processes that measure together.

    Raises:
        ValueError: An unknown setting (the nearest is suggested), or a solution too few or too many.
    """
    if (other is not None) != (probe.num_solutions == 2):
        number = "two runs: name the second" if probe.num_solutions == 2 else "one run: name no second"
        raise ValueError(f"probe {probe.name!r} looks at {number}")
    arguments = keyword_arguments(probe, settings or {})
    folder, label = label_of(run, other)
    risk = risk if risk is not None else risk_of(run)
    parameters = inspect.signature(probe.measure).parameters
    arguments |= {name: risk_of(run, split=name, ranks=risk.ranks) for name in SPLITS if name in parameters}
    if "snapshots" in parameters:
        arguments["snapshots"] = checkpoint.snapshots(run.folder)
    if "through" in arguments:  # names of run folders
        arguments["through"] = [load_run(path).model for path in arguments["through"]]
    elif _ON_A_PATH & {arguments.get("directions"), arguments.get("direction")}:
        arguments["trajectory"] = [snapshot.weights for snapshot in checkpoint.snapshots(run.folder)]
    if "ranks" in parameters:
        arguments["ranks"] = ranks
    # Several processes would write the same file.
    if ranks.count == 1 and risk.ranks.count == 1 and "resume" in parameters:
        arguments.setdefault("resume", folder.path / "probes" / probe.name / f"{label}.partial.npz")
    solutions = (run.model, other.model) if other is not None else ()
    result = probe.measure(risk, *solutions, progress=progress, **arguments)
    if ranks.rank == 0 and risk.ranks.rank == 0:
        folder.write_probe(probe.name, label, *result.to_record())
    return result


def plan_of(probe: Probe, risk: EmpiricalRisk, settings: Mapping[str, Any]) -> Plan:
    """What a probe would cost with these settings.

    Raises:
        ValueError: Another probe than the spectrum, or an unknown setting.
    """
    if probe.name != "spectrum":
        raise ValueError(f"--dry-run: expected the probe 'spectrum', got {probe.name!r}; its docstring states its cost")
    arguments = keyword_arguments(probe, settings)
    return plan(risk, arguments.get("k", 5), options=arguments.get("options"))


def keyword_arguments(probe: Probe, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Flat settings as the probe takes them: those that its options object has go into one."""
    parameters = inspect.signature(probe.measure).parameters
    fields = {field.name for field in dataclasses.fields(probe.options)} if probe.options else set()
    known = {name for name, p in parameters.items() if p.kind is not p.POSITIONAL_ONLY}
    known -= {"risk", "progress", "options", *FROM_RUN}
    for name in settings:
        if name not in known | fields:
            raise ValueError(f"probe {probe.name!r}: unknown setting {name!r}, {suggestion(name, known | fields)}")
    arguments = {name: value for name, value in settings.items() if name in known}
    if probe.options:
        arguments["options"] = probe.options(**{name: value for name, value in settings.items() if name in fields})
    return arguments


def label_of(run: LoadedRun, other: LoadedRun | None = None) -> tuple[RunFolder, str]:
    """The folder that a record goes to, and its label there."""
    if other is None:
        return run.folder, str(run.step)
    here, there = Path(run.folder.path).resolve(), Path(other.folder.path).resolve()
    folder = RunFolder(run.folder.path.parent) if here.parent == there.parent else run.folder
    return folder, f"{here.name}--{there.name}"
