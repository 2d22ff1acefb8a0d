"""The homotopy learning rate in a run: each step's rate, and the rows that say what it was read off."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from math import isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from losslab.optim.homotopy.curvature import CurvatureEstimator
from losslab.optim.homotopy.history import Measured, MeasuredLayer, export
from losslab.optim.homotopy.layer_groups import by_module
from losslab.optim.homotopy.layers import PerLayerHomotopyLR
from losslab.optim.homotopy.scheduler import HomotopyLR
from losslab.ranks import Ranks
from losslab.studies.data import Split
from losslab.studies.record import RunFolder
from losslab.studies.sections import RunConfig

if TYPE_CHECKING:
    from lightning_fabric import Fabric

KIND = "homotopy"  # of the rows
CSV = "homotopy.csv"
# A row's number -> its curve in TensorBoard.
TAGS = {
    "kappa": "homotopy/kappa",
    "hessian_norm": "homotopy/lambda",
    "curvature": "homotopy/curvature",
    "lr": "homotopy/eta",
    "factor": "homotopy/eta_over_eta0",
    "loss": "homotopy/loss",
    "grad_norm": "homotopy/gradient_norm",
    "trace": "homotopy/trace",
}


class HomotopyRate:
    """A `HomotopyLR` on the batches of a run, or a `PerLayerHomotopyLR` with the network's modules for layers.

    The curvature is that of the network's mean cross-entropy on the first examples of the present batch, in training
    mode, at the precision of the run; each process takes its share of them. A batch with fewer, the last of a pass, is
    filled up from the split's beginning: one example is more curved than any batch, and would brake for nothing.

    Args:
        fabric: The run's precision.
        config: The run's.
        network: As it is inside of Fabric's wrapper, and of DistributedDataParallel's.
        optimizer: As it is inside of Fabric's wrapper.
        split: The training split.
        total: Steps of the run.
    """

    def __init__(
        self, fabric: "Fabric", config: RunConfig, network: nn.Module, optimizer: Optimizer, split: Split, total: int
    ) -> None:
        schedule = config.schedule
        self._fabric, self._network, self._ranks = fabric, network, Ranks.world()
        self._fill = split.head(schedule.examples_of(config.dataset.batch_size, config.training.accumulate))
        self._part = self._fill
        estimator = CurvatureEstimator(
            power_iterations=schedule.power_iterations, num_samples=schedule.num_samples, seed=config.seed
        )
        options = asdict(schedule.homotopy(total))
        options |= {"model": network, "estimator": estimator}
        self.scheduler: HomotopyLR | PerLayerHomotopyLR = (
            PerLayerHomotopyLR(optimizer, self._loss, layers=by_module(network), **options)
            if schedule.per_layer
            else HomotopyLR(optimizer, self._loss, **options)
        )

    @property
    def rates(self) -> list[float]:
        """Of the next step, a number for each group."""
        return [float(rate) for rate in self.scheduler.get_last_lr()]

    @property
    def skipped(self) -> int:
        """Estimates that were not finite."""
        return self.scheduler.skipped

    def follow(self, inputs: Tensor, targets: Tensor) -> list[dict[str, Any]]:
        """After a step on a batch: find the next step's rate. The optimizer's groups keep the one they had.

        Returns:
            A row, if the curvature was measured; or one for each layer.
        """
        examples = len(self._fill)
        missing = max(examples - len(targets), 0)
        inputs = torch.cat([inputs[:examples], self._fill.inputs[:missing]])
        targets = torch.cat([targets[:examples], self._fill.targets[:missing]])
        own = slice(self._ranks.rank % examples, None, self._ranks.count)
        self._part = Split(inputs[own], targets[own])
        groups = self.scheduler.optimizer.param_groups
        used = [group["lr"] for group in groups]
        self.scheduler.step()
        for group, rate in zip(groups, used, strict=True):
            group["lr"] = rate
        rows = [self._row(measured) for measured in self.scheduler.history]
        self.scheduler.history.clear()  # they are in metrics.jsonl, and need not be in every checkpoint too
        return rows

    def state_dict(self) -> dict[str, Any]:
        """What the next rates depend on."""
        return self.scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.scheduler.load_state_dict(state)

    def _loss(self) -> Tensor:
        with self._fabric.autocast():
            logits = self._network(self._part.inputs)
        return cross_entropy(logits.float(), self._part.targets)

    def _row(self, measured: Measured) -> dict[str, Any]:
        """The history's row by its own names, with κ and η/η₀; without what was not asked for."""
        values = {k: v for k, v in asdict(measured).items() if k != "step" and not (isinstance(v, float) and isnan(v))}
        scheduler = self.scheduler
        newest = scheduler.found[values["layer"]] if isinstance(scheduler, PerLayerHomotopyLR) else scheduler.measured
        assert newest is not None
        base = scheduler.base_lr
        more = {"kappa": newest.kappa, "factor": measured.lr / base if base else 0.0, "skipped": self.skipped}
        return {"kind": KIND, **values, **more}


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """A row's numbers under TensorBoard's tags, each layer's under its own."""
    ending = f"/{row['layer']}" if "layer" in row else ""
    return {tag + ending: row[key] for key, tag in TAGS.items() if key in row}


def export_rows(folder: RunFolder) -> Path:
    """Write a run's rows as `homotopy.csv` into its folder, in the form of its scheduler's `export_metrics`."""
    rows = [row for row in folder.metrics() if row.get("kind") == KIND]
    form = MeasuredLayer if any("layer" in row for row in rows) else Measured
    names = [field.name for field in fields(form)]
    path = folder.path / CSV
    export([form(**{name: row.get(name, nan) for name in names}) for row in rows], form, path)
    return path
