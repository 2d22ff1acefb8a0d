"""A run in work: what is trained, by what, how far it has come, and what is due after each step."""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from losslab.memory import peak_bytes
from losslab.ranks import Ranks
from losslab.status import Progress, StopRequested
from losslab.studies import checkpoint
from losslab.studies.averaging import Judged
from losslab.studies.data import Batches, Dataset, Split, augmentation
from losslab.studies.devices import random_states, restore_random_states
from losslab.studies.environment import environment
from losslab.studies.evaluation import sums
from losslab.studies.homotopy import HomotopyRate, export_rows
from losslab.studies.models import build_model
from losslab.studies.monitor import parameter_norm
from losslab.studies.optimizers import build_optimizer
from losslab.studies.position import Position
from losslab.studies.record import ModelSink, RunFolder, Sink
from losslab.studies.schedules import rate_factor
from losslab.studies.sections import RunConfig
from losslab.studies.stepping import Stepper
from losslab.studies.talt_monitor import TALTMonitor

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Training:
    """A run in work. Made under `seeded`: the first weights come from torch's global generator.

    Args:
        fabric: Device, precision, processes.
        config: What to train.
        data: On the device.
        folder: Where everything goes.
        sinks: Further takers of rows.
        progress: Called after each step.
    """

    def __init__(
        self,
        fabric: "Fabric",
        config: RunConfig,
        data: Dataset,
        folder: RunFolder,
        sinks: Sequence[Sink],
        progress: Progress | None,
    ) -> None:
        self.fabric, self.config, self.folder, self.progress = fabric, config, folder, progress
        self.sinks, self.ranks = (folder, *sinks), Ranks.world()
        self.order = torch.Generator().manual_seed(config.seed)  # of the examples
        self.pass_order = self.order.get_state()  # as the present pass began
        self.batches = Batches(data.train, config.dataset.batch_size, self.order)
        self.validation, self.test = (self._share(split) for split in (data.validation, data.test))
        self.vary = augmentation(config.dataset.augment)
        self.network = build_model(config.model, data.input_shape, data.num_classes, data.vocabulary)
        # The layout takes 0.65-0.72 of the default's time for convolutions on a CPU; other layers do not notice. The
        # device comes before the optimizer: some, Adagrad for one, make their state at once.
        self.network.to(fabric.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.bare = build_optimizer(config.optimizer, self.network)
        self.heights = [float(group["lr"]) for group in self.bare.param_groups]  # of the groups' rates
        model, self.optimizer = fabric.setup(self.network, self.bare)
        self.model = model
        self.judged = Judged(self.network, self.bare, config.training.ema, self.batches)
        self.stepper = Stepper(fabric, model, self.optimizer, config.training)
        every = config.training.monitor_talt
        self.talt = TALTMonitor(self.bare, self.network.named_parameters(), every) if every else None
        steps = config.training.epochs * len(self.batches)
        self.total = min(steps, config.training.max_steps or steps)
        self.homotopy = (
            HomotopyRate(fabric, config, self.network, self.bare, data.train, self.total)
            if config.schedule.name == "homotopy"
            else None
        )
        self.at, self.note = Position(), ""
        self.times: deque[float] = deque(maxlen=1000)
        self.whole, self.stopping = True, False

    def start(self, resume: bool) -> None:
        """Begin the run in its folder, or go on from its checkpoint."""
        if resume and "last" in checkpoint.names(self.folder):
            self._restore()
        else:
            self._begin()
        for sink in self._model_sinks():
            sink.open(self.network, self.batches.split.inputs[: self.batches.batch_size], self.at.step)

    def close(self) -> None:
        """Tell the sinks that no further row comes."""
        if self.talt is not None:
            self.talt.close()
        for sink in self._model_sinks():
            sink.close()

    def run(self) -> None:
        """Train to the end, or to where it is told to stop; then the final row."""
        while self.at.step < self.total and self.at.status is None and not self.stopping:
            self._one_pass()
        if self.stopping:
            return
        final: dict[str, Any] = {"kind": "final", "status": self.at.status or "completed"}
        if self.config.training.target is not None:
            final |= {key: self.at.reached.get(key) for key in ("reached_step", "reached_seconds", "reached_epoch")}
        if self.config.training.evaluate_test:
            final["test_loss"], final["test_accuracy"] = self._evaluate(self.test)
        final["step_seconds"] = median(self.times) if self.times else math.nan
        final["peak_memory_bytes"] = peak_bytes(self.fabric.device)
        if self.homotopy is not None:
            final["skipped_estimates"] = self.homotopy.skipped
        self._log(final)
        if self.homotopy is not None and self.ranks.rank == 0:
            export_rows(self.folder)

    def save_if_whole(self) -> None:
        """Write the checkpoint of now, unless a step is half done."""
        if self.whole:
            self._save("last")

    def _begin(self) -> None:
        """What a folder has before the first step."""
        if self.ranks.rank == 0:
            self.folder.path.mkdir(parents=True, exist_ok=True)
            self.folder.write_config(self.config.model_dump(mode="json"))
            self.folder.write_environment(environment(seed=self.config.seed, device=self.fabric.device))
            self.folder.rewind(-1)
        else:  # other dropout in each process, after the same first weights
            torch.default_generator.manual_seed(self.config.seed + self.ranks.rank)
        self._set_rate()
        self._snapshot(last=False)

    def _one_pass(self) -> None:
        done = self.at.step % len(self.batches)
        if done == 0:
            self.pass_order = self.order.get_state()
        for inputs, targets in self.batches.one_pass(done):
            self._step(inputs, targets)
            if self.at.step == self.total or self.at.status is not None or self.stopping:
                return

    def _step(self, inputs: Tensor, targets: Tensor) -> None:
        """One step, and all that is due after it."""
        self.whole, began = False, time.perf_counter()
        self._set_rate()
        training, after = self.config.training, self.at.step + 1
        is_row = after == self.total or after % len(self.batches) == 0 or _due(training.eval_every, after)
        inputs = self._varied(inputs)
        taken = self.stepper.take(inputs, targets, measured=is_row)
        rows: list[dict[str, Any]] = []
        if math.isfinite(taken.loss):
            rows = self.homotopy.follow(inputs, targets) if self.homotopy is not None else []
            self.judged.update()
        self.times.append(time.perf_counter() - began)
        self.at.add(taken, self.times[-1])
        for row in (*rows, *(self.talt.rows() if self.talt is not None else ())):
            self._log(row)
        self.whole = True
        ends = self.at.step == self.total or self.at.status is not None
        self._snapshot(last=ends)
        if is_row or ends:
            self._row(taken.gradient_norm)
        elif _due(training.checkpoints.every, self.at.step):
            self._save("last")
        if _due(training.checkpoints.keep, self.at.step):
            self._save(f"step-{self.at.step}")
        note = f"loss {taken.loss:.4g}  {self.note}".rstrip()
        self._tell(lambda: self.progress and self.progress(self.at.step, self.total, note))
        self.stopping = self.ranks.any(self.stopping)  # all stop together
        if self.stopping and not ends:
            self._save("last")

    def _row(self, gradient_norm: float) -> None:
        """Evaluate, log, and keep what is good."""
        epoch = self.at.step / len(self.batches)
        times = {"epoch": int(epoch) if epoch.is_integer() else epoch, "seconds": self.at.seconds}
        rate = next(group["lr"] for group in self.optimizer.param_groups if group["params"])
        row = {"kind": "epoch", **times, "learning_rate": rate, **self.at.take_means()}
        loss, accuracy = self._evaluate(self.validation)
        row |= {"validation_loss": loss, "validation_accuracy": accuracy}
        row |= {"parameter_norm": parameter_norm(self.network), "gradient_norm": gradient_norm}
        self._aim(row, epoch)
        self._log(row)
        if self.at.status != "diverged" and (accuracy, -loss) > self.at.best:
            self.at.best = (accuracy, -loss)
            self._save("best", row)
        self._save("last", row)
        self.note = f"validation accuracy {accuracy:.1%}"

    def _aim(self, row: dict[str, Any], epoch: float) -> None:
        """Is this the target?"""
        target = self.config.training.target
        if target is None or self.at.reached or self.at.status == "diverged" or not target.reached(row[target.metric]):
            return
        self.at.reached = {"reached_step": self.at.step, "reached_seconds": self.at.seconds, "reached_epoch": epoch}
        if target.stop:
            self.at.status = "reached"

    def _evaluate(self, batches: Batches) -> tuple[float, float]:
        """Mean loss and accuracy of the judged weights, over all processes."""
        with self.judged.in_place():
            loss, correct, examples = self.ranks.total(*sums(self.model, batches))
        return loss / examples, correct / examples

    def _varied(self, inputs: Tensor) -> Tensor:
        """Augmented, by a generator of this step's own: nothing of it needs to be remembered."""
        if self.vary is None:
            return inputs
        seed = (self.config.seed << 32) + self.at.step
        return self.vary(inputs, torch.Generator().manual_seed(seed))

    def _set_rate(self) -> None:
        groups = self.optimizer.param_groups
        if self.homotopy is not None:
            rates = self.homotopy.rates
        else:
            factor = rate_factor(self.config.schedule, self.at.step, self.total)
            rates = [height * factor for height in self.heights]
        for group, own in zip(groups, rates, strict=True):
            group["lr"] = own

    def _share(self, split: Split) -> Batches:
        """This process's part of a split to evaluate on."""
        own = slice(self.ranks.rank, None, self.ranks.count)
        return Batches(Split(split.inputs[own], split.targets[own]), self.config.dataset.eval_batch_size)

    def _snapshot(self, *, last: bool) -> None:
        """Keep the weights of now if the configuration asks for them."""
        if self.ranks.rank == 0 and self.config.training.snapshots.include(self.at.step, last=last):
            checkpoint.snapshots(self.folder).take(self.at.step, self.network, self.bare)

    def _log(self, row: dict[str, Any]) -> None:
        for sink in self.sinks if self.ranks.rank == 0 else ():
            self._tell(lambda sink=sink: sink.log(self.at.step, row))  # type: ignore[misc]

    def _model_sinks(self) -> list[ModelSink]:
        return [sink for sink in self.sinks if isinstance(sink, ModelSink)] if self.ranks.rank == 0 else []

    def _tell(self, call: Callable[[], Any]) -> None:
        """Call what may ask to stop."""
        try:
            call()
        except StopRequested:
            self.stopping = True

    def _save(self, name: str, row: dict[str, Any] | None = None) -> None:
        """Write a checkpoint: the judged weights, and all that is needed to go on."""
        states = random_states(self.fabric)
        if self.ranks.rank > 0:
            return
        with self.judged.in_place() as trained:
            training = {
                "position": asdict(self.at),
                "trained": trained,
                "average": self.judged.average is not None,
                "optimizer": self.bare.state_dict(),
                "precision": self.fabric.strategy.precision.state_dict(),
                "order": self.pass_order if self.at.step % len(self.batches) else self.order.get_state(),
                "random": states,
                "note": self.note,
                "talt": self.talt.state_dict() if self.talt is not None else None,
                "homotopy": self.homotopy.state_dict() if self.homotopy is not None else None,
            }
            state = {"epoch": self.at.step / len(self.batches), "metrics": row or {}}
            try:
                checkpoint.save(self.folder, name, self.network, state, training, step=self.at.step)
            except TypeError as error:  # of an optimizer of the user's own: all else here is ours
                what = f"the state_dict of {self.config.optimizer.name} cannot be kept in a checkpoint"
                raise ValueError(f"optimizer.name: {what}: {str(error).removeprefix('training/.')}") from error

    def _restore(self) -> None:
        """Go on from the checkpoint "last"."""
        found = checkpoint.load(self.folder, "last")
        saved = found.training
        found.put_into(self.network)
        if saved["average"]:
            self.judged.average = {
                name: tensor.to(self.fabric.device, copy=True) for name, tensor in found.weights.items()
            }
        if saved["trained"]:
            checkpoint.Checkpoint(found.step, saved["trained"], {}).put_into(self.network)
        self.bare.load_state_dict(saved["optimizer"])
        self.fabric.strategy.precision.load_state_dict(saved["precision"])
        self.at, self.note = Position(**saved["position"]), saved["note"]
        if self.talt is not None:
            self.talt.load_state_dict(saved["talt"])
        if self.homotopy is not None:
            self.homotopy.load_state_dict(saved["homotopy"])
        self.pass_order = saved["order"]
        self.order.set_state(self.pass_order)
        restore_random_states(self.fabric, saved["random"])
        if self.ranks.rank == 0:
            self.folder.rewind(self.at.step)


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
