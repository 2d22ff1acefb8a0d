"""One training run of the learning-rate study, decided by its `Run` alone, and the cache of those that are done."""

import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import optimizer_runs
import torch
from homotopy_methods import make_scheduler
from homotopy_tasks import TASKS
from optimizer_cache import Runs
from optimizer_data import Data
from optimizer_runs import FINAL_SEED, Record, batches, evaluate, make_optimizer
from torch import Tensor

from losslab.optim import HomotopyLR, PerLayerHomotopyLR
from losslab.studies.models.table import scale_weights

VERSION = "5"  # to be raised when any number of HomotopyLR's changes
VERSIONS = {"stable": "8"}  # of a rule, where only its have changed since
UNCHANGED = "2"  # of the schedules, which are none of its
CHECKED = 10  # steps from one look at the loss to the next: each waits for the device
CURVED = ("quadratic", "mlp")  # tasks whose every loss is kept
KEPT = ("step", "loss", "lr", "curvature", "hessian_norm", "grad_norm", "target", "seconds")


@dataclass(frozen=True)
class Run(optimizer_runs.Run):
    """Everything that decides how a run ends: the optimizer's settings are its η₀ and a row of `METHODS`.

    Not the device, nor torch's version, so that a study may be done on another machine and read here.
    """

    @property
    def key(self) -> str:
        """Names its file."""
        rule = self.settings.get("rule")
        version = VERSIONS.get(rule, VERSION) if rule else UNCHANGED
        said = {**asdict(self), "versions": [TASKS[self.task].version, version]}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:20]


class Training:
    """A run under way.

    Attributes:
        seconds: Of each step, that of the scheduler included: the processor's, or a GPU's, which is waited for where
            `timed`.
        due: Whether each was followed by an estimate of the curvature.
    """

    def __init__(self, run: Run, data: Data, device: torch.device, *, timed: bool = False) -> None:
        self.task, self.run, self.data, self.device, self.timed = TASKS[run.task], run, data, device, timed
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            self.model = self.task.model()
        with torch.no_grad():
            scale_weights(self.model, run.scale)
        self.model.to(device)
        settings = dict(run.settings)
        self.optimizer = make_optimizer(run.optimizer, {"lr": settings.pop("lr")}, self.model)
        size = run.batch_size or self.task.batch_size
        self.scheduler = make_scheduler(self.optimizer, settings, run.horizon, self.loss_of, size, self.model)
        self.batches = batches(self.task, data, run, torch.Generator().manual_seed(run.seed))
        self.batch: tuple[Tensor, Tensor] = data.train
        self.steps, self.diverged = 0, False
        self.losses: list[Tensor] = []
        self.seconds: list[float] = []
        self.due: list[bool] = []
        self.measured: object = None

    def loss_of(self, count: int) -> Tensor:
        """Of so many examples of the present batch."""
        x, y = self.batch
        return self.task.loss(self.model(x[:count]), y[:count])

    def step(self) -> None:
        """One step, and the next one's rate."""
        self.batch = next(self.batches)
        began = self._now()
        self.optimizer.zero_grad()
        loss = self.loss_of(len(self.batch[1]))
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.seconds.append(self._now() - began)
        newest = getattr(self.scheduler, "measured", None)
        self.due.append(newest is not self.measured)
        self.measured = newest
        self.steps += 1
        if self.task.name in CURVED:
            self.losses.append(loss.detach())
        if self.steps % CHECKED == 0 or self.steps == self.run.horizon:
            self.diverged = not math.isfinite(loss.item())

    def _now(self) -> float:
        if self.device.type != "cuda":
            return time.thread_time()  # what this thread has had of the processor, whatever else runs beside it
        if self.timed:
            torch.cuda.synchronize()
        return time.perf_counter()

    def finish(self, after: Callable[[], None] = lambda: None) -> "Training":
        """Train to the horizon, or until the loss is not finite; `after` each step something more."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*curvature that is not finite")
            while self.steps < self.run.horizon and not self.diverged:
                self.step()
                after()
        return self

    def record(self) -> Record:
        """Where it ended: a loss that is not finite is an infinite one."""
        found: Record = {"diverged": self.diverged, "loss": math.inf, "accuracy": 0.0, "steps": self.steps}
        if not self.diverged:
            loss, found["accuracy"] = evaluate(self.task, self.model, self.data.validation)
            if self.run.seed >= FINAL_SEED:
                found["test_loss"], found["test_accuracy"] = evaluate(self.task, self.model, self.data.test)
            found["loss"] = loss if math.isfinite(loss) else math.inf
        if self.losses:
            found["curve"] = short(torch.stack(self.losses).tolist())
        if isinstance(self.scheduler, HomotopyLR):
            rows = [asdict(row) for row in self.scheduler.history]
            found["history"] = {name: short([row[name] for row in rows]) for name in KEPT}
        elif isinstance(self.scheduler, PerLayerHomotopyLR):
            found["history"] = {"step": [step for step, due in enumerate(self.due, start=1) if due]}
        return {**found, "device": self.device.type, "torch": torch.__version__}


def short(numbers: list[float]) -> list[float]:
    """To five digits: files of a whole study stay small."""
    return [float(f"{number:.5g}") for number in numbers]


def train(run: Run, data: Data, device: torch.device) -> Record:
    """Train to the horizon, or until the loss is not finite."""
    return Training(run, data, device).finish().record()


class HomotopyRuns(Runs):
    """All runs of this study, done or to be done, on one device."""

    def __init__(self, folder: Path, data: Path | None, device: str = "cpu", *, start: bool = True) -> None:
        super().__init__(folder, data, start=start)
        self.device = torch.device(device)

    def data_of(self, task: str) -> Data:
        """The splits, on the device."""
        return _on(task, self.data or Path(), self.device)

    def train(self, run: Any) -> Record:
        """Do one run."""
        return train(run, self.data_of(run.task), self.device)


@cache
def _on(task: str, folder: Path, device: torch.device) -> Data:
    return Data(*((x.to(device), y.to(device)) for x, y in TASKS[task].data(folder)))
