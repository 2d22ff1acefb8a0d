"""A batch: many runs from one file, into one folder."""

import dataclasses
import json
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from losslab.status import Progress
from losslab.studies.batch_file import Batch, Entry
from losslab.studies.config_file import ConfigError
from losslab.studies.data import Dataset, load_dataset
from losslab.studies.engine import run_jobs
from losslab.studies.engine.following import Table
from losslab.studies.engine.jobs import EngineOptions, Job, Outcome
from losslab.studies.lock import locked
from losslab.studies.models import build_model
from losslab.studies.optimizers import build_optimizer
from losslab.studies.record import LOCKS, RunFolder, write_json
from losslab.studies.sections import DatasetConfig

RESOLVED, SUMMARY = "batch.json", "summary.json"


def rehearsed(batch: Batch) -> Batch:
    """The batch, with what only data and networks can tell among its problems.

    Each data set is loaded, and each network built for it, once: a name that is nowhere, data that are not there, a
    network that does not take such inputs are known before anything is trained.
    """
    sound: list[Entry] = []
    problems = list(batch.problems)
    data: dict[DatasetConfig, Dataset] = {}
    for entry in batch.entries:
        try:
            _rehearse(entry, data)
            sound.append(entry)
        except (ValueError, TypeError, OSError) as error:
            problems.append(f"{entry.source}: {' '.join(str(error).split())}")
    return dataclasses.replace(batch, entries=tuple(sound), problems=tuple(problems))


def run_batch(
    batch: Batch,
    folder: str | Path,
    options: EngineOptions | None = None,
    *,
    skip_invalid: bool = False,
    progress: Progress | None = None,
    table: Table | None = None,
) -> list[Outcome]:
    """Train all runs of a batch, each in the folder of its name; started again, what is not finished.

    `batch.json` holds what was asked for, `summary.json` how it ended.

    Args:
        batch: From `read_batch`.
        folder: The study folder.
        options: As for `run_jobs`.
        skip_invalid: Whether the sound entries are trained where others are broken.
        progress: As for `run_jobs`.
        table: As for `run_jobs`.

    Returns:
        How each run ended. One that failed has not ended the others.

    Raises:
        ConfigError: Entries are broken, and `skip_invalid` is false; or none is sound.
        FileExistsError: Another batch is in the folder, or something else.
        BlockingIOError: Another process works there.
    """
    batch = rehearsed(batch)
    if batch.problems and not (skip_invalid and batch.entries):
        remedy = "mend the file, or pass --skip-invalid" if batch.entries else "mend the file"
        raise ConfigError("\n".join([*batch.problems, f"nothing was started: {remedy}"]))
    path, began = Path(folder), time.monotonic()
    jobs = [Job(entry.config.name, entry.config, path / entry.config.name) for entry in batch.entries]
    _require_same_batch(path, {job.name for job in jobs})
    with locked(path):
        configs = [job.config.model_dump(mode="json") for job in jobs]
        write_json(path / RESOLVED, {"description": batch.description, "runs": configs})
        outcomes = run_jobs(jobs, options, progress, table=table)
        summary = {
            "description": batch.description,
            "ended": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": time.monotonic() - began,
            "problems": batch.problems,
            "runs": [_summary(outcome) for outcome in outcomes],
        }
        write_json(path / SUMMARY, summary)
    return outcomes


def final_row(outcome: Outcome) -> dict[str, Any]:
    """The row that ended a run; empty where it did not come to its end."""
    ended = outcome.status in ("finished", "skipped")
    return (RunFolder(outcome.folder).final or {}) if ended else {}


def _rehearse(entry: Entry, data: dict[DatasetConfig, Dataset]) -> None:
    """Make what the run is made of. Its network is thrown away, its random numbers are nobody's."""
    config = entry.config
    if config.dataset not in data:
        data[config.dataset] = load_dataset(config.dataset)
    found = data[config.dataset]
    with torch.random.fork_rng(devices=[]):
        network = build_model(config.model, found.input_shape, found.num_classes, found.vocabulary)
    build_optimizer(config.optimizer, network)


def _require_same_batch(path: Path, names: set[str]) -> None:
    """A batch file may grow; one with other runs belongs in another folder."""
    try:
        before = {run["name"] for run in json.loads((path / RESOLVED).read_text(encoding="utf-8"))["runs"]}
    except FileNotFoundError:
        if path.is_dir() and any(child.name not in LOCKS for child in path.iterdir()):
            raise FileExistsError(f"{path}: the folder is not empty, and no batch; choose another one") from None
        return
    except (ValueError, KeyError, TypeError):
        raise FileExistsError(f"{path / RESOLVED}: not a batch's; choose another output folder") from None
    if not before & names:
        raise FileExistsError(f"{path}: another batch is there; choose another output folder")


def _summary(outcome: Outcome) -> dict[str, Any]:
    values = dataclasses.asdict(outcome) | {"folder": outcome.folder.name}
    return {**values, "final": final_row(outcome)}
