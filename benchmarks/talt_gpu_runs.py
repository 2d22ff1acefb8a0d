"""One training run of talt_gpu.py, the cost of its steps, and the file of all runs that were done."""

import gc
import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from optimizer_runs import make_optimizer, numbers
from talt_gpu_tasks import Batch, Data, GPUTask, smoothed
from torch import nn
from torch.optim import Optimizer

from losslab.studies.schedules import rate_factor
from losslab.studies.sections import ScheduleConfig

WARMUP = 0.1  # of the horizon
CHECKED = 50  # steps from one look at the loss to the next: each waits for the device
MEASURED, WINDOW = 42, 20  # bases are renewed every 10 or 20 steps
Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """Everything that decides how a run ends.

    Attributes:
        task: Its name.
        stage: "steps", "tune" or "final".
        contender: Optimizer, or the name of TALT with other options.
        settings: Of the optimizer.
        seed: Of weights and batches.
        steps: The horizon.
    """

    task: str
    stage: str
    contender: str
    settings: dict[str, Any] = field(hash=False)
    seed: int
    steps: int


class Records:
    """Finished runs as JSON lines: each is on the disk as soon as it is done, and never done again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.all: list[tuple[Run, Record]] = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            if line.endswith("}"):  # the last one may have been cut off
                said = json.loads(line)
                self.all.append((Run(**said["run"]), said["record"]))

    def find(self, run: Run) -> Record | None:
        """What came of a run, if it was done."""
        return next((record for known, record in self.all if known == run), None)

    def of(self, task: str, stage: str, contender: str | None = None) -> list[tuple[Run, Record]]:
        """All runs of a stage, in the order in which they were done."""
        return [
            (run, record)
            for run, record in self.all
            if (run.task, run.stage) == (task, stage) and contender in (None, run.contender)
        ]

    def add(self, run: Run, record: Record) -> None:
        """Keep it, and say so."""
        self.all.append((run, record))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"run": asdict(run), "record": record}) + "\n")
        said = {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in record.items()}
        print(run.task, run.stage, run.contender, run.settings.get("lr"), run.steps, run.seed, said, flush=True)


class Training:
    """A network under way."""

    def __init__(self, run: Run, task: GPUTask, data: Data, device: torch.device) -> None:
        self.run, self.task, self.device = run, task, device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            self.model: nn.Module = task.model().to(device)
        self.optimizer: Optimizer = make_optimizer(run.contender.partition("-")[0], run.settings, self.model)
        self.schedule = ScheduleConfig(name="linear", warmup_steps=max(1, round(WARMUP * run.steps)))
        self.highest = [group["lr"] for group in self.optimizer.param_groups]
        self.batches: Iterator[Batch] = data.batches(run.seed, final=run.stage == "final")
        self.done = 0
        self.loss = torch.zeros(())

    def gradient(self) -> None:
        """At the next batch, for the next step of the schedule."""
        for group, highest in zip(self.optimizer.param_groups, self.highest, strict=True):
            group["lr"] = highest * rate_factor(self.schedule, min(self.done, self.run.steps - 1), self.run.steps)
        x, y = next(self.batches)
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16):
            outputs = self.model(x)
            self.loss = smoothed(self.task, outputs, y)
        self.loss.backward()
        self.done += 1

    @torch.no_grad()
    def evaluate(self, data: Data) -> tuple[float, float]:
        """Mean loss without smoothing, and the share of wrong answers."""
        self.model.eval()
        loss = wrong = torch.zeros((), device=self.device)
        count = 0
        for x, y in data.scored(final=self.run.stage == "final"):
            with torch.autocast(self.device.type, torch.bfloat16):
                outputs = self.model(x)
            loss = loss + nn.functional.cross_entropy(outputs.float(), y, reduction="sum")
            wrong = wrong + (outputs.argmax(1) != y).sum()
            count += y.numel()
        self.model.train()
        return float(loss) / count, float(wrong) / count


def train(run: Run, task: GPUTask, data: Data, device: torch.device) -> Record:
    """To the horizon, or until the loss is not finite: score, and seconds of all steps, without the evaluation."""
    training = Training(run, task, data, device)
    synchronize()
    began, diverged = time.perf_counter(), False
    while training.done < run.steps and not diverged:
        training.gradient()
        try:
            training.optimizer.step()
        except torch.linalg.LinAlgError:  # SOAP, of a covariance that overflowed
            diverged = True
        if training.done % CHECKED == 0 or training.done == run.steps:
            diverged |= not math.isfinite(float(training.loss.detach()))
    synchronize()
    seconds = time.perf_counter() - began
    loss, error = (math.inf, 1.0) if diverged else training.evaluate(data)
    loss = loss if math.isfinite(loss) else math.inf
    score = task.score(loss, error) if math.isfinite(loss) else math.inf
    return {"score": score, "loss": loss, "error": error, "seconds": seconds, "steps": training.done}


def measure(run: Run, task: GPUTask, data: Data, device: torch.device) -> Record:
    """Milliseconds of forward and backward and of the optimizer, of the last steps; memory. The device is waited for
    after each half of a step, so both halves together are at least a step of `train`.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    training = Training(run, task, data, device)
    model_times, optimizer_times = [], []
    while training.done < run.steps:
        synchronize()
        first = time.perf_counter()
        training.gradient()
        synchronize()
        second = time.perf_counter()
        training.optimizer.step()
        synchronize()
        model_times.append(1e3 * (second - first))
        optimizer_times.append(1e3 * (time.perf_counter() - second))
    window = optimizer_times[-WINDOW:]
    parameters = sum(parameter.numel() for parameter in training.model.parameters())
    return {
        "steps": training.done,
        "model_ms": statistics.median(model_times[-WINDOW:]),
        "optimizer_ms": statistics.median(window),
        "optimizer_mean_ms": statistics.mean(window),
        "optimizer_most_ms": max(window),
        "first_ms": optimizer_times[0],
        "parameters": parameters,
        "state_numbers": numbers(list(training.optimizer.state.values())),
        "peak": torch.cuda.max_memory_allocated() if device.type == "cuda" else math.nan,
    }


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
