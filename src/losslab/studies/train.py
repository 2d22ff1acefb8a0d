"""Training: a configuration in, a run folder out.

Lightning Fabric owns the device and the precision; all the rest is in `train`, to be read from top to bottom.
"""

import logging
import math
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from losslab.status import Progress
from losslab.studies import checkpoint
from losslab.studies.config import make_config
from losslab.studies.data import Batches, Dataset, load_dataset
from losslab.studies.environment import environment
from losslab.studies.models import build_model
from losslab.studies.optimizers import build_optimizer, rate_factor
from losslab.studies.record import RunFolder, Sink
from losslab.studies.sections import RunConfig


def train(
    config: RunConfig, folder: RunFolder, *, sinks: Sequence[Sink] = (), progress: Progress | None = None
) -> RunFolder:
    """Train as configured and leave everything in `folder`.

    An epoch's row holds the mean training loss and accuracy *while* the weights moved and those on the
    validation split *after* it; `seconds` counts training only. Checkpoints: "last", and "best" by validation
    accuracy. The test split is evaluated once, with the last weights. When the training loss is not finite,
    training ends and the final row says `"diverged": true`. Ctrl-C writes the checkpoint of now and is raised again.
    Weights on the way are kept as `training.snapshots` says.

    Args:
        config: What to train, on what, how.
        folder: An empty run folder, from `RunFolder.create`.
        sinks: Other takers of the rows that go to `metrics.jsonl`.
        progress: Called after each step with the steps done and in all, and the latest validation accuracy.

    Returns:
        `folder`.
    """
    fabric = _fabric(config)
    data = load_dataset(config.dataset).to(fabric.device)
    batches = Batches(data.train, config.dataset.batch_size, torch.Generator().manual_seed(config.seed))
    validation = Batches(data.validation, config.dataset.eval_batch_size)
    test = Batches(data.test, config.dataset.eval_batch_size)
    epoch, best, note = _Epoch(), (-math.inf, -math.inf), ""
    total = _total_steps(config, batches)
    with _seeded(config.seed, fabric.device):
        network = build_model(config.model, data.input_shape, data.num_classes)
        # 0.65-0.72 of the default layout's time for convolutions on a CPU; other layers do not notice.
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model, optimizer = fabric.setup(network, build_optimizer(config.optimizer, network.parameters()))
        folder.write_config(config.model_dump(mode="json"))
        folder.write_environment(environment(seed=config.seed, device=fabric.device))
        try:
            _set_rate(optimizer, config, 0, total)
            _keep(config, folder, network, optimizer, 0, last=False)
            for step in _steps(fabric, config, model, optimizer, batches):
                epoch.add(step)
                ends = step.number == total or not step.finite
                _keep(config, folder, network, optimizer, step.number, last=ends)
                if progress is not None:
                    progress(step.number, total, note)
                if not step.ends_epoch:
                    continue
                loss, accuracy = evaluate(model, validation)
                row = {**epoch.row(), "validation_loss": loss, "validation_accuracy": accuracy}
                _log((folder, *sinks), step.number, row)
                checkpoint.save(folder, "last", network, epoch.state(row))
                if step.finite and (accuracy, -loss) > best:
                    best = (accuracy, -loss)
                    checkpoint.save(folder, "best", network, epoch.state(row))
                note = f"validation accuracy {accuracy:.1%}"
                epoch = epoch.next()
            loss, accuracy = evaluate(model, test)
        except KeyboardInterrupt:
            checkpoint.save(folder, "last", network, epoch.state({}))
            raise
    diverged = {} if step.finite else {"diverged": True}
    final = {"kind": "final", "test_loss": loss, "test_accuracy": accuracy, **diverged}
    _log((folder, *sinks), step.number, final)
    return folder


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Mean cross-entropy and accuracy over all examples, in eval mode; the mode is left as found."""
    was_training = model.training
    model.eval()
    try:
        loss, correct, examples = 0.0, 0, 0
        for inputs, targets in batches:
            logits = model(inputs)
            loss += cross_entropy(logits, targets, reduction="sum").item()
            correct += _correct(logits, targets)
            examples += len(targets)
    finally:
        model.train(was_training)
    return loss / examples, correct / examples


@dataclass(frozen=True)
class LoadedRun:
    """A trained model with what it was trained on, on the CPU, in eval mode."""

    config: RunConfig
    model: nn.Module
    dataset: Dataset
    folder: RunFolder
    step: int


def load_run(path: str | Path, which: str = "last") -> LoadedRun:
    """Rebuild the trained model of a run folder.

    Args:
        path: The run folder.
        which: The checkpoint: "last" or "best".

    Raises:
        FileNotFoundError: If there is no run, or no such checkpoint.
        ValueError: If the configuration or the checkpoint is damaged.
    """
    folder = RunFolder.open(path)
    config = make_config(folder.config, source=str(folder.path / "config.json"))
    dataset = load_dataset(config.dataset)
    with _seeded(
        config.seed, torch.device("cpu")
    ):  # the weights are overwritten, the global generator is not
        model = build_model(config.model, dataset.input_shape, dataset.num_classes).eval()
    state = checkpoint.load(folder, which, model)
    return LoadedRun(config=config, model=model, dataset=dataset, folder=folder, step=state["step"])


def probe_batches(run: LoadedRun, split: str | None = None) -> Batches:
    """The examples that the run's configuration sets aside for probes, or as many of another split; always the same."""
    probes = run.config.probes
    examples = getattr(run.dataset, split or probes.split).head(probes.examples)
    return Batches(examples, probes.batch_size)


@dataclass(frozen=True)
class _Step:
    """One optimizer step, its loss taken before it. Where the loss is not finite, no step follows it."""

    number: int
    learning_rate: float
    loss: float
    correct: int
    examples: int
    seconds: float
    ends_epoch: bool

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss)


def _steps(
    fabric: Fabric, config: RunConfig, model: nn.Module, optimizer: Optimizer, batches: Batches
) -> Iterator[_Step]:
    """Take the optimizer's steps one by one, to the last or to a loss that is not finite."""
    number, total, finite = 0, _total_steps(config, batches), True
    while number < total and finite:
        for inputs, targets in batches:
            started = time.perf_counter()
            rate = _set_rate(optimizer, config, number, total)
            model.train()
            logits = model(inputs)
            loss = cross_entropy(logits, targets)
            if finite := math.isfinite(loss.item()):
                optimizer.zero_grad()
                fabric.backward(loss)
                if config.training.clip_norm is not None:
                    fabric.clip_gradients(
                        model, optimizer, max_norm=config.training.clip_norm, error_if_nonfinite=False
                    )
                optimizer.step()
                number += 1
            last = number == total or not finite
            yield _Step(
                number=number,
                learning_rate=rate,
                loss=loss.item(),
                correct=_correct(logits, targets),
                examples=len(targets),
                seconds=time.perf_counter() - started,
                ends_epoch=last or number % len(batches) == 0,
            )
            if last:
                break


def _set_rate(optimizer: Optimizer, config: RunConfig, number: int, total: int) -> float:
    """The learning rate of step `number`, counted from 0, for all parameters."""
    rate = config.optimizer.lr * rate_factor(config.schedule, number, total)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def _total_steps(config: RunConfig, batches: Batches) -> int:
    steps = config.training.epochs * len(batches)
    return min(steps, config.training.max_steps or steps)


class _Epoch:
    """The steps of one epoch, summed; `number` counts from 1 and `seconds` from the start of the training."""

    def __init__(self, number: int = 1, seconds: float = 0.0, step: int = 0) -> None:
        self.number, self.seconds, self.step = number, seconds, step
        self.rate, self.loss, self.correct, self.examples = math.nan, 0.0, 0, 0

    def add(self, step: _Step) -> None:
        self.step, self.rate = step.number, step.learning_rate
        self.seconds += step.seconds
        self.loss += step.loss * step.examples
        self.correct += step.correct
        self.examples += step.examples

    def row(self) -> dict[str, Any]:
        return {
            "kind": "epoch",
            "epoch": self.number,
            "seconds": self.seconds,
            "learning_rate": self.rate,
            "train_loss": self.loss / self.examples,
            "train_accuracy": self.correct / self.examples,
        }

    def state(self, row: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint's state: where it was taken and what was measured there."""
        return {"step": self.step, "epoch": self.number, "metrics": row}

    def next(self) -> "_Epoch":
        return _Epoch(self.number + 1, self.seconds, self.step)


def _correct(logits: Tensor, targets: Tensor) -> int:
    return int((logits.argmax(1) == targets).sum())


def _keep(
    config: RunConfig, folder: RunFolder, network: nn.Module, optimizer: Optimizer, step: int, *, last: bool
) -> None:
    """Keep the weights after `step` steps if the configuration asks for them."""
    if config.training.snapshots.include(step, last=last):
        checkpoint.snapshots(folder).take(step, network, optimizer)


def _log(sinks: Iterable[Sink], step: int, row: dict[str, Any]) -> None:
    for sink in sinks:
        sink.log(step, row)


def _fabric(config: RunConfig) -> Fabric:
    """Fabric on one device, without its remarks; what it would replace silently is refused."""
    logger, level = logging.getLogger("lightning_fabric"), logging.getLogger("lightning_fabric").level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            training = config.training
            fabric = Fabric(accelerator=training.device, devices=1, precision=training.precision)
    except RuntimeError:
        raise ValueError(f"training.device: {config.training.device} is not there; use auto or cpu") from None
    finally:
        logger.setLevel(level)
    if config.training.precision == "16-mixed" and fabric.device.type == "cpu":
        raise ValueError("training.precision: 16-mixed needs an accelerator; use bf16-mixed on a CPU")
    return fabric


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators inside; torch.manual_seed would reach every device's."""
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        if gpus:
            torch.cuda.manual_seed(seed)
        yield
