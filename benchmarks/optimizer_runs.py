"""One training run of the optimizer study, decided by its `Run` alone.

Weights and the order of examples come from its seed; the learning rate rises over 5 % of the horizon and then falls to
zero in a straight line.
"""

import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

import torch
from optimizer_data import Data
from optimizer_tasks import TASKS, Task
from table import installed
from torch import Tensor, nn
from torch.optim import Optimizer

from losslab.optim import TALT, TALTOptions
from losslab.optim.groups import talt_param_groups
from losslab.studies.config import make_config
from losslab.studies.models.table import scale_weights
from losslab.studies.optimizers import build_optimizer, evaluating
from losslab.studies.schedules import rate_factor
from losslab.studies.sections import ScheduleConfig

TALT_VERSION = "6"  # to be raised when any number of TALT's changes
WARMUP = 0.05
FINAL_SEED = 100  # from here on seeds are final ones: never chosen by, and the only ones whose test split is looked at
EVALUATED = 500  # examples at a time
version = cache(installed)  # looked up for every run's key
Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """Everything that decides how a run ends.

    Attributes:
        task: Its name.
        optimizer: Its name.
        settings: Of the optimizer; those of TALT may name its options.
        seed: Of the first weights and the batches.
        horizon: Steps.
        batch_size: None is the task's.
        scale: What the first weights are multiplied by.
    """

    task: str
    optimizer: str
    settings: dict[str, Any] = field(hash=False)
    seed: int
    horizon: int
    batch_size: int | None = None
    scale: float = 1.0

    @property
    def key(self) -> str:
        """Names its file: of all of the above, of the task's version and of the code that steps."""
        package = version("pytorch_optimizer") if self.optimizer in ("soap", "shampoo", "schedule_free") else None
        own = TALT_VERSION if self.optimizer == "talt" else package
        said = {**asdict(self), "versions": [TASKS[self.task].version, own, version("torch")]}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:20]


def make_optimizer(name: str, settings: dict[str, Any], model: nn.Module) -> Optimizer:
    """A row of losslab's table, or TALT with any of its options.

    TALT's settings may be those of its groups too: `exclude`, and `structures` of hidden weights by kind of module.
    """
    if name != "talt":
        return build_optimizer(make_config({"optimizer": {"name": name, **settings}}).optimizer, model)
    own = {key: settings[key] for key in ("lr", "betas", "weight_decay", "structure") if key in settings}
    options = {key: value for key, value in settings.items() if key not in (*own, "exclude", "structures")}
    hidden, *others = talt_param_groups(model, **{key: settings[key] for key in ("exclude",) if key in settings})
    for kind, structure in settings.get("structures", {}).items():
        chosen = {id(module.weight) for module in model.modules() if type(module).__name__ == kind}
        others.append({"params": [pair for pair in hidden["params"] if id(pair[1]) in chosen], "structure": structure})
        hidden["params"] = [pair for pair in hidden["params"] if id(pair[1]) not in chosen]
    groups = [group for group in (hidden, *others) if group["params"]]
    return TALT(groups, options=TALTOptions(**options), **own)


def batches(task: Task, data: Data, run: Run, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Without end: every example once in a random order, then in another one."""
    x, y = data.train
    size, order = run.batch_size or task.batch_size, torch.empty(0, dtype=torch.long)
    while True:
        while len(order) < size:
            order = torch.cat([order, torch.randperm(len(y), generator=generator)])
        chosen, order = order[:size], order[size:]
        images, targets = x[chosen], y[chosen]
        if task.noise:
            images = images + task.noise * torch.randn(images.shape, generator=generator)
        yield images, targets


@torch.no_grad()
def evaluate(task: Task, model: nn.Module, split: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Mean loss and accuracy; NaN where there is no accuracy."""
    model.eval()
    total = correct = 0.0
    for x, y in zip(*(part.split(EVALUATED) for part in split), strict=True):
        outputs = model(x)
        total += float(task.loss(outputs, y)) * len(y)
        if task.classes:
            correct += float((outputs.argmax(1) == y).float().mean()) * len(y)
    model.train()
    return total / len(split[1]), correct / len(split[1]) if task.classes else math.nan


class Training:
    """A run under way: the network, its optimizer, and the seconds that went into each."""

    def __init__(self, run: Run, data: Data) -> None:
        self.task, self.run, self.data = TASKS[run.task], run, data
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            self.model = self.task.model()
        with torch.no_grad():
            scale_weights(self.model, run.scale)
        self.optimizer = make_optimizer(run.optimizer, run.settings, self.model)
        self.schedule = ScheduleConfig(name="linear", warmup_steps=max(1, round(WARMUP * run.horizon)))
        self.highest = [group["lr"] for group in self.optimizer.param_groups]
        self.batches = batches(self.task, data, run, torch.Generator().manual_seed(run.seed))
        self.steps, self.diverged = 0, False
        self.model_seconds = self.optimizer_seconds = 0.0

    def step(self) -> None:
        """One step of the schedule."""
        x, y = next(self.batches)
        for group, highest in zip(self.optimizer.param_groups, self.highest, strict=True):
            group["lr"] = highest * rate_factor(self.schedule, self.steps, self.run.horizon)
        began = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.task.loss(self.model(x), y)
        loss.backward()
        between = time.perf_counter()
        failed = False
        try:
            self.optimizer.step()
        except torch.linalg.LinAlgError:  # SOAP and Shampoo, of a covariance that overflowed
            failed = True
        ended = time.perf_counter()
        self.model_seconds += between - began
        self.optimizer_seconds += ended - between
        self.steps += 1
        self.diverged = failed or not math.isfinite(loss.item())

    def record(self) -> Record:
        """Where it ended: a loss that is not finite is an infinite one."""
        found: Record = {"diverged": self.diverged, "loss": math.inf, "accuracy": 0.0}
        if not self.diverged:
            with evaluating(self.optimizer):
                loss, found["accuracy"] = evaluate(self.task, self.model, self.data.validation)
                if self.run.seed >= FINAL_SEED:
                    found["test_loss"], found["test_accuracy"] = evaluate(self.task, self.model, self.data.test)
            found["loss"] = loss if math.isfinite(loss) else math.inf
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return {
            **found,
            "steps": self.steps,
            "model_ms": 1e3 * self.model_seconds / self.steps,
            "optimizer_ms": 1e3 * self.optimizer_seconds / self.steps,
            "parameters": parameters,
            "state_numbers": numbers(list(self.optimizer.state.values())),
        }


def numbers(state: Any) -> int:
    """How many numbers tensors hold that stand anywhere in lists and dicts."""
    if isinstance(state, Tensor):
        return state.numel()
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return sum(map(numbers, parts))


def train(run: Run, data: Data) -> Record:
    """Train to the horizon, or until the loss is not finite."""
    training = Training(run, data)
    while training.steps < run.horizon and not training.diverged:
        training.step()
    return training.record()
