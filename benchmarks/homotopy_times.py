"""What an estimate costs, measured in turns by one process that should be alone on its cores."""

import json
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from homotopy_methods import DEFAULT, LAYERS, Settings, estimates
from homotopy_runs import HomotopyRuns, Training
from homotopy_study import COUNTS, Study
from optimizer_cache import Missing
from optimizer_times import ALONE

from losslab.studies.record import write_json

STEPS, DENSE = 320, 120  # of each round, and how many of them have dense estimates, which leave no cache warm
STILL = 1e-6  # η₀: all stay at like weights, whose zeros decide how long a step takes
REFERENCE = "constant"


@dataclass(frozen=True)
class Cost:
    """Milliseconds, of each round.

    Attributes:
        plain: A step that no estimate follows, once estimates are far apart.
        due: One that an estimate follows.
        base: A step of a constant rate, in the same round.
        share: The processor's part of the wall time.
        device: Where.
    """

    plain: list[float]
    due: list[float]
    base: list[float]
    share: list[float]
    device: str

    @property
    def alone(self) -> bool:
        """Whether this was measured on a quiet machine."""
        return statistics.median(self.share) >= ALONE

    def overhead(self, horizon: int, frequency: int, *, steady: bool = False) -> float:
        """Additional time in that of a constant rate: over a whole run, or once estimates are `frequency` apart."""
        part = 1 / frequency if steady else estimates(horizon, frequency) / horizon
        plain, due, base = (np.array(column) for column in (self.plain, self.due, self.base))
        return float(np.median((1 - part) * plain / base + part * due / base - 1))


def contenders(study: Study) -> dict[str, Settings]:
    """A constant rate, the default rule with as many examples as are studied, and a rate for each layer."""
    rule, others = study.settings(DEFAULT), {name: study.settings(name) for name in (REFERENCE, LAYERS)}
    return {**others, **{name_of(count): {**rule, "examples": count} for count in COUNTS}}


def name_of(examples: int | None) -> str:
    """Of a contender."""
    return "the whole batch" if examples is None else f"{examples} examples"


def measure(study: Study, rounds: int) -> None:
    """Time all contenders in turns; the result is one file."""
    chosen = contenders(study)
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in chosen}
    for number in range(rounds):
        for name in chosen if number % 2 == 0 else reversed(chosen):
            found[name].append(_round(study, chosen[name]))
    base = [plain for plain, _, _ in found.pop(REFERENCE)]
    device = _device(study.runs)
    costs = {}
    for name, rows in found.items():
        plain, due, share = (list(column) for column in zip(*rows, strict=True))
        costs[name] = {"plain": plain, "due": due, "base": base, "share": share, "device": device}
    path = _path(study, study.runs.device.type)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, costs)


def _round(study: Study, settings: Settings) -> tuple[float, float, float]:
    runs = study.runs
    data = runs.data_of(study.setting.task)
    run = study.run(settings, STILL, 0, STEPS)
    Training(run, data, runs.device).step()  # what the first step of a process loads and chooses is nobody's
    training = Training(run, data, runs.device, timed=True)
    wall, processor = time.perf_counter(), time.process_time()
    while training.steps < run.horizon:
        training.step()
    share = (time.process_time() - processor) / (time.perf_counter() - wall)
    seconds, due = 1e3 * np.array(training.seconds), np.array(training.due)
    apart = np.arange(STEPS) >= DENSE
    plain = float(seconds[apart & ~due].mean())
    return plain, float(seconds[due][1:].mean()) if due.sum() > 1 else plain, share


def _device(runs: HomotopyRuns) -> str:
    if runs.device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"one core, {platform.machine()}"


def _path(study: Study, device: str) -> Path:
    return study.runs.folder / study.setting.task / f"time-{study.setting.optimizer}-{device}.json"


def known(study: Study, devices: Sequence[str] = ("cpu", "cuda")) -> dict[str, Cost]:
    """What was measured on the first of these devices on which anything was.

    Raises:
        Missing: Nothing was.
    """
    for path in (_path(study, device) for device in devices):
        if path.exists():
            return {name: Cost(**cost) for name, cost in json.loads(path.read_text()).items()}
    raise Missing(f"step times of {study.setting.title} on {' or '.join(devices)}")
