"""Loss and accuracy at any point, in one pass."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from losslab.operators import batches as kinds
from losslab.operators.risk import EmpiricalRisk


@dataclass(frozen=True)
class Score:
    """L(θ), and the share of right answers; NaN where outputs are not class scores with class indices as targets."""

    loss: float
    accuracy: float


@torch.no_grad()
def score_at(risk: EmpiricalRisk, vector: Tensor, buffers: dict[str, Tensor] | None = None) -> Score:
    """How good is the network at θ of shape (P,)?  Loss and accuracy over the risk's data.

    An answer is right where the largest of the C > 1 scores of an output (B, C, …) is at the target's class, (B, …);
    targets below zero (`ignore_index`) are not counted. Of a batch that is a mapping or an object the targets are its
    `labels`, and an output that is one gives its `logits`.

    Args:
        risk: Whose data, loss and model.
        vector: θ.
        buffers: Replace buffers of the model by name, for example by `batch_statistics`.

    Returns:
        Score. Cost: one forward pass.
    """
    parameters = risk.space.named_views(risk.space.check(vector).clone()) | (buffers or {})
    loss = torch.zeros((), dtype=torch.float64, device=risk.device)
    right = answers = 0.0
    with risk.evaluating():
        for batch, count in risk.read():
            output, targets = risk.output(parameters, batch), kinds.targets_of(batch)
            loss += kinds.batch_loss(risk.loss_fn, output, targets) * risk.batch_weight(count)
            one = _right_answers(_entry(output, "logits"), _entry(targets, "labels"))
            right, answers = right + one[0], answers + one[1]
    total, right, answers = risk.ranks.total(float(loss), right, answers)
    return Score(total, right / answers if answers else math.nan)


@torch.no_grad()
def guessing_accuracy(risk: EmpiricalRisk) -> float:
    """How often is the answer that is right most often right?  The share of the most frequent class among the targets.

    NaN where `score_at` gives no accuracy. Cost: one forward pass.
    """
    parameters, counts = risk.space.named_views(risk.space.vector()), torch.zeros(0, dtype=torch.float64)
    with risk.evaluating():
        for batch, _ in risk.read():
            scores, targets = risk.output(parameters, batch), kinds.targets_of(batch)
            scores, targets = _entry(scores, "logits"), _entry(targets, "labels")
            if _are_classes(scores, targets):
                found = torch.bincount(targets[targets >= 0].reshape(-1), minlength=scores.shape[1]).double().cpu()
                counts = found if not len(counts) else counts + found
    width = max(int(width) for width in risk.ranks.each(len(counts)))
    counts = torch.tensor(risk.ranks.total(*counts.tolist(), *[0.0] * (width - len(counts))))
    return float(counts.max() / counts.sum()) if width and counts.sum() else math.nan


def _right_answers(scores: Any, targets: Any) -> tuple[int, int]:
    """How many answers are right, of how many; none where these are not class scores and class indices."""
    if not _are_classes(scores, targets):
        return 0, 0
    counted = targets >= 0
    return int(((scores.argmax(1) == targets) & counted).sum()), int(counted.sum())


def _are_classes(scores: Any, targets: Any) -> bool:
    if not isinstance(scores, Tensor) or not isinstance(targets, Tensor) or targets.is_floating_point():
        return False
    # A single score is a logit, whose largest is always the first.
    return scores.ndim >= 2 and scores.shape[1] > 1 and targets.shape == scores.shape[:1] + scores.shape[2:]


def _entry(item: Any, name: str) -> Any:
    """The tensor itself, or what a mapping or an object holds under the name."""
    if isinstance(item, Tensor):
        return item
    return item.get(name) if isinstance(item, Mapping) else getattr(item, name, None)
