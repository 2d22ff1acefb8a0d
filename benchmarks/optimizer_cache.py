"""All runs of the optimizer study that were ever done, and those that are still to be.

Each finished run is one file, written whole or not at all, so a study that was ended goes on where it was, and several
processes share the work: whoever holds a run's lock does it.
"""

import json
import os
import random
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout
from optimizer_runs import Record, Run, train
from optimizer_tasks import TASKS

from losslab.records import decode
from losslab.studies.record import write_json

Item = TypeVar("Item")


class Missing(Exception):
    """Runs that were not done yet, where none may be started."""


class Runs:
    """All runs, done or to be done.

    Args:
        folder: The cache, where the finished ones are.
        data: Folder of the data files.
        start: Whether runs that are not there are done; if not, asking for one raises `Missing`.
    """

    def __init__(self, folder: Path, data: Path | None, *, start: bool = True) -> None:
        self.folder, self.data, self.start = folder, data, start

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        """In another order in each process, so that two of them are seldom at the same thing."""
        return random.Random(os.getpid()).sample(items, len(items))

    def path(self, run: Run) -> Path:
        """The file of a run."""
        return self.folder / run.task / f"{run.key}.json"

    def found(self, run: Run) -> Record | None:
        """The record of a finished run."""
        path = self.path(run)
        return decode(json.loads(path.read_text()))["record"] if path.exists() else None

    def __call__(self, runs: Sequence[Run]) -> list[Record]:
        """The records of these, in their order; other processes' runs are waited for."""
        left = [run for run in runs if self.found(run) is None]
        if left and not self.start:
            raise Missing(f"{len(left)} of {len(runs)} runs of {left[0].optimizer} at {left[0].horizon} steps")
        while left:
            for run in self.shuffled(left):
                self._try(run)
            left = [run for run in left if self.found(run) is None]
            time.sleep(0.5 if left else 0)
        return [self.found(run) or {} for run in runs]

    def train(self, run: Run) -> Record:
        """Do one run."""
        return train(run, TASKS[run.task].data(self.data or Path()))

    def _try(self, run: Run) -> None:
        """Do a run, unless another process does."""
        path = self.path(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"), timeout=0)
        try:
            with lock:
                if self.found(run) is None:
                    began = time.perf_counter()
                    record = self.train(run)
                    record["seconds"] = time.perf_counter() - began
                    write_json(path, {"run": asdict(run), "record": record})
                    print(f"{run.task} {run.optimizer} {run.horizon} {run.seed}: {record['loss']:.4g}", flush=True)
            path.with_suffix(".lock").unlink(missing_ok=True)
        except Timeout:
            pass
