"""Which parts of TALT earn their keep, and how much does a learning rate that is off cost it and its rivals?

All runs have half the horizon at which the settings were tuned, where the differences are. A variant keeps TALT's tuned
settings but for its own learning rate: since a method without scaling needs another one by orders of magnitude, each
walks in half decades from the tuned one to where the loss of a tuning seed is smallest.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from optimizer_runs import Run
from optimizer_study import OPTIMIZERS, Settings, Study
from table import markdown

from losslab.optim import FIXES, TALTOptions
from losslab.optim.eigenspace.options import FIRST_VERSION
from losslab.studies.compare.statistics import Estimate, difference_estimate, share_near_best

HALF = -2  # T·2^(k/2) with this k
STRIDE = 10**0.5
FARTHEST = 8  # strides from the tuned learning rate
BATCHES = (16, 64, 128, 512)
SCALES = (0.5, 1.0, 2.0)  # of the first weights
STRIDES = range(-3, 4)  # three decades around the tuned learning rate
SENSITIVITY_SEEDS = 5

_ON = {name: getattr(TALTOptions(), name) for name in FIXES}
_ALL = dict.fromkeys(FIXES, True)
_NONE = dict.fromkeys(FIXES, False)
# Gradients as large as they are take rates a hundred times as large: from the tuned one no walk would find them, and
# the tuned weight decay, which is multiplied by the rate, would leave nothing of the weights.
_RAW = {"lr": 1.0, "weight_decay": 0.0}
NORMAL = "parameter_normalization"
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "all eight fixes": _ALL,
    **{f"without {name}": {name: False, **(_RAW if name == NORMAL else {})} for name in FIXES if _ON[name]},
    **{f"with {name}": {name: True} for name in FIXES if not _ON[name]},
    **{f"only {name}": {**_NONE, name: True, **({} if name == NORMAL else _RAW)} for name in FIXES},
    "no fixes": {**_NONE, **_RAW},
    "v1": {**FIRST_VERSION, **_RAW},
    **{f"power {p:g}": {"power": p} for p in (0.0, 0.25, 0.5)},
    "refresh every step": {"dynamic_updates": False, "update_interval": 1},
    "refresh every 10 from the start": {"dynamic_updates": False, "update_interval": 10},
    "refresh early, then every 10": {"dynamic_updates": True, "update_interval": 10},
    "refresh every step for 20 steps": {"dynamic_updates": True, "update_ramp": 10},
    "refresh at a change of gradient": {"trigger": "gradient_change", "trigger_bound": 0.5},
    "refresh at off-diagonal energy": {"trigger": "off_diagonal", "trigger_bound": 0.15},
    **{f"valley strength {v:g}": {"valley_strength": v} for v in (0.0, 0.5, 1.0, 2.0)},
    "damping 0.5": {"damping": 0.5},
    "clip 10": {"clip": 10.0},
    "no Nesterov": {"nesterov": False},
    "singular values as they are": {"orthogonal": False},
    **{f"sides whole up to {k}": {"max_side": k} for k in (32, 64, 256, 1024)},
    "one-sided": {"one_sided": True},
    "lowrank": {"structure": "lowrank"},
    "diagonal": {"structure": "diagonal"},
    "polar": {"structure": "polar", "exclude": ["embedding", "head"]},
    "polar for convolutions": {"structures": {"Conv2d": "polar"}},
    "polar for linear layers": {"structures": {"Linear": "polar"}},
    "not the last layer": {"exclude": ["embedding", "head"]},
    "embeddings too": {"exclude": []},
}


class Half:
    """A task's runs at half the horizon.

    Args:
        study: The task, whose tuned settings are taken.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.horizon = study.protocol.horizon(study.task, HALF)
        self.seeds = study.protocol.final_seeds(study.task)

    def losses(self, optimizer: str, settings: Settings, seeds: Sequence[int], **more: Any) -> np.ndarray:
        """Final validation losses of these seeds."""
        runs = [Run(self.study.task.name, optimizer, settings, seed, self.horizon, **more) for seed in seeds]
        return np.array([record["loss"] for record in self.study.runs(runs)])

    def walked(self, optimizer: str, settings: Settings, **more: Any) -> Settings:
        """The settings with the learning rate where a tuning seed's loss is smallest, in half decades."""

        def at(stride: int) -> Settings:
            return {**settings, "lr": float(f"{settings['lr'] * STRIDE**stride:.4g}")}

        known = {stride: self.losses(optimizer, at(stride), [0], **more)[0] for stride in (-1, 0, 1)}
        while True:
            best = min(known, key=lambda stride: (known[stride], abs(stride)))
            if not math.isfinite(known[best]):
                best = min(known)  # all diverged: a smaller one
            fresh = [stride for stride in (best - 1, best + 1) if stride not in known and abs(stride) <= FARTHEST]
            if not fresh:
                return at(best)
            known |= {stride: self.losses(optimizer, at(stride), [0], **more)[0] for stride in fresh}

    def variant(self, name: str) -> tuple[Settings, np.ndarray]:
        """A variant's settings, and its losses over the final seeds."""
        settings = self.walked("talt", {**self.study.tuned("talt").settings, **VARIANTS[name]})
        return settings, self.losses("talt", settings, self.seeds)


def ablation_lines(study: Study, variants: Sequence[str], batches: Sequence[int] = BATCHES) -> list[str]:
    """A task's two tables: variants against the default, and TALT against AdamW at other batch sizes, if any."""
    half, rows = Half(study), []
    _, default = half.variant("default")
    for name in variants:
        settings, losses = half.variant(name)
        difference = difference_estimate(losses, default)
        rows.append([name, f"{settings['lr']:.2g}", f"{np.median(losses):.4g}", *_said(difference)])
    lines = [f"## {study.task.title}", "", f"{half.horizon} steps, n = {len(half.seeds)} paired seeds.", ""]
    lines += [*markdown(("variant", "lr", "median loss", "mean difference from the default", ""), rows), ""]
    rows = []
    for size in batches:
        found = []
        for optimizer in ("talt", "adamw"):
            settings = half.walked(optimizer, study.tuned(optimizer).settings, batch_size=size)
            found.append(half.losses(optimizer, settings, half.seeds, batch_size=size))
        medians = [f"{np.median(losses):.4g}" for losses in found]
        rows.append([str(size), *medians, *_said(difference_estimate(*found))])
    return [*lines, *markdown(("batch", "TALT", "AdamW", "mean difference", ""), rows), ""] if rows else lines


def _said(difference: Estimate) -> list[str]:
    """With its interval, and in a word."""
    if math.isnan(difference.value):
        return ["–", "some diverged"]
    number = f"{difference.value:+.3g} [{difference.low:+.3g}, {difference.high:+.3g}]"
    better, worse = difference.high < 0, difference.low > 0
    return [number, "better" if better else "worse" if worse else "no significant difference"]


def sensitivity_lines(study: Study, optimizers: Sequence[str] = OPTIMIZERS) -> list[str]:
    """A task's table for each scale of the first weights: median losses over three decades of learning rates."""
    half = Half(study)
    seeds = half.seeds[:SENSITIVITY_SEEDS]
    lines = [f"## {study.task.title}", "", f"{half.horizon} steps, n = {len(seeds)} seeds: median losses.", ""]
    head = ["optimizer", *(f"lr × {STRIDE**stride:.2g}" for stride in STRIDES), "within 5 % of its best", "of all"]
    for scale in SCALES:
        table = {}
        for name in optimizers:
            tuned = study.tuned(name).settings
            rates = [float(f"{tuned['lr'] * STRIDE**stride:.4g}") for stride in STRIDES]
            table[name] = [np.median(half.losses(name, {**tuned, "lr": lr}, seeds, scale=scale)) for lr in rates]
        best = min(min(medians) for medians in table.values())
        rows = [
            [name, *(f"{loss:.4g}" for loss in medians), *_shares(medians, best)] for name, medians in table.items()
        ]
        lines += [f"First weights × {scale:g}:", "", *markdown(head, rows), ""]
    return lines


def _shares(medians: Sequence[float], best: float) -> list[str]:
    """Of the learning rates: near this optimizer's best, and near the best of all optimizers."""
    near = share_near_best(medians, larger_is_better=False)
    overall = np.mean(np.asarray(medians) <= 1.05 * best)
    return [f"{100 * near:.0f} %", f"{100 * overall:.0f} %"]
