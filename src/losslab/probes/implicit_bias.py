"""The loss that SGD with a finite step really descends: its terms, and how batch gradients agree."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from losslab.operators.gradient_graph import GradientGraph
from losslab.operators.kept_graphs import KeptGraphs
from losslab.operators.minibatches import minibatch_loss
from losslab.operators.required import require_risk
from losslab.operators.risk import EmpiricalRisk
from losslab.params import Solution
from losslab.probes.base import ProbeResult, summary
from losslab.probes.elsewhere import moved
from losslab.probes.trajectories.snapshots import Snapshot
from losslab.status import Progress, Status, StopRequested


@dataclass(frozen=True)
class ImplicitBiasResult(ProbeResult):
    """SGD's modified loss at T points, in the order given. E is the mean over the batches B, each counted once.

    Attributes:
        losses: (T,) L = E L_B.
        modified: (T,) L + (η/4) E‖g_B‖², what SGD with one batch a step descends: the sum of `losses`, `gd_penalties`
            and `noise_penalties`.
        gd_penalties: (T,) (η/4)‖g‖², g = E g_B: all of it for full-batch gradient descent.
        noise_penalties: (T,) (η/4) E‖g_B − g‖².
        gradient_steps: (T,) η‖g‖, the length of the plain step.
        sgd_corrections: (T,) (η²/2)‖E H_B g_B‖, the length by which SGD's penalty changes it.
        gd_corrections: (T,) (η²/2)‖Hg‖, by which gradient descent's does.
        quoted_corrections: (T,) (η²/2)‖∇‖∇L‖²‖ = η²‖Hg‖: of the expansion −η∇L − (η²/2)∇‖∇L‖², as it is often
            quoted. That is twice `gd_corrections` and leaves the noise out.
        batch_cosines: (T,) the mean cosine between the gradients of two different batches; NaN for a single one.
        penalty_cosines: (T,) between g and the gradient (η/2) E H_B g_B of SGD's penalty: above zero both can fall
            together. NaN where g is zero to rounding.
    """

    losses: np.ndarray
    modified: np.ndarray
    gd_penalties: np.ndarray
    noise_penalties: np.ndarray
    gradient_steps: np.ndarray
    sgd_corrections: np.ndarray
    gd_corrections: np.ndarray
    quoted_corrections: np.ndarray
    batch_cosines: np.ndarray
    penalty_cosines: np.ndarray
    learning_rate: float
    num_batches: int
    num_examples: int

    def __str__(self) -> str:
        rows = {
            "loss": f"{self.losses[-1]:.4g} (the last of {len(self.losses)} points)",
            "modified loss": f"{self.modified[-1]:.4g}: {self.gd_penalties[-1]:.3g} of the mean gradient and "
            f"{self.noise_penalties[-1]:.3g} of the batches' noise more",
            "step": f"{self.gradient_steps[-1]:.3g}, bent by {self.sgd_corrections[-1]:.3g}; by "
            f"{self.gd_corrections[-1]:.3g} with one batch of all examples, "
            f"{self.quoted_corrections[-1]:.3g} as quoted",
            "cosines": f"{self.batch_cosines[-1]:.3f} between batches, "
            f"{self.penalty_cosines[-1]:.3f} between loss and penalty",
            "cost and status": f"{self.num_batches} batches, η = {self.learning_rate:g}, {self.status}",
        }
        return summary(rows)


def implicit_bias(
    risk: EmpiricalRisk,
    *,
    learning_rate: float,
    points: Sequence[Solution | Snapshot] | None = None,
    progress: Progress | None = None,
) -> ImplicitBiasResult:
    """Which loss does SGD with a finite step descend?  L + (η/4) E‖∇L_B‖².

    One epoch of SGD with step η over the batches B in random order ends, in the mean over the orders and up to terms
    of third order in η, where gradient flow on this modified loss does in the same time (Smith et al. 2021, equation
    1); for one batch of all examples it is L + (η/4)‖∇L‖² (Barrett & Dherin 2021). The penalty splits into
    (η/4)‖g‖² and the noise's (η/4) E‖g_B − g‖², which grows as batches shrink.

    The batches are the risk's: give it those of the training. Each is one step and so counts the same, also where the
    last is smaller; L is then their mean, not that over the examples.

    Args:
        risk: Whose model, loss and batches.
        learning_rate: η of plain SGD. Momentum, weight decay and adaptive steps are not in the formula.
        points: Where: solutions, or `Snapshots` of a training; default the model's present parameters. The risk's
            model is not moved.
        progress: Called after each batch of each of two passes.

    Returns:
        ImplicitBiasResult. Cost a point: two gradients and two products with the Hessian, 5 to 6 g. A stop leaves the
        points measured by then.

    Raises:
        ValueError: learning_rate not above 0, no point at all, or one of another architecture.
        RuntimeError: A module without second derivatives; the message names it.
    """
    require_risk(risk)
    if not (learning_rate > 0 and math.isfinite(learning_rate)):
        raise ValueError(f"learning_rate: expected a finite number > 0, got {learning_rate!r}")
    if points is not None and not len(points):
        raise ValueError("points: expected at least one solution, or None for the model's own, got none")
    count = 1 if points is None else len(points)
    tick = _Passes(progress, 2 * count * risk.num_batches)
    found: list[_Terms] = []
    status = Status.complete
    try:
        for index in range(count):
            there = risk if points is None else moved(risk, _state(points[index]), f"points[{index}]")
            found.append(_terms(there, tick))
    except StopRequested:
        if not found:
            raise
        status = Status.stopped
    columns = {f.name: np.array([getattr(terms, f.name) for terms in found]) for f in fields(_Terms)}
    if not np.isfinite(columns["loss"] + columns["square"]).all():
        status = Status.nonfinite
    return _result(status, columns, learning_rate, int(risk.ranks.total(risk.num_batches)[0]), risk.num_examples)


@dataclass(frozen=True)
class _Terms:
    """Means over the batches at one point: of losses, ‖g_B‖², and what follows from g and H."""

    loss: float
    square: float  # E‖g_B‖²
    norm: float  # ‖g‖
    penalty: float  # ‖E H_B g_B‖
    curved: float  # ‖Hg‖
    batch_cosine: float
    penalty_cosine: float


def _result(
    status: Status, columns: dict[str, np.ndarray], eta: float, num_batches: int, num_examples: int
) -> ImplicitBiasResult:
    square, norm = columns["square"], columns["norm"]
    return ImplicitBiasResult(
        status=status,
        losses=columns["loss"],
        modified=columns["loss"] + eta / 4 * square,
        gd_penalties=eta / 4 * norm**2,
        noise_penalties=eta / 4 * np.maximum(square - norm**2, 0.0),  # below zero by rounding alone
        gradient_steps=eta * norm,
        sgd_corrections=eta**2 / 2 * columns["penalty"],
        gd_corrections=eta**2 / 2 * columns["curved"],
        quoted_corrections=eta**2 * columns["curved"],
        batch_cosines=columns["batch_cosine"],
        penalty_cosines=columns["penalty_cosine"],
        learning_rate=float(eta),
        num_batches=num_batches,
        num_examples=num_examples,
    )


class _BatchGraph(GradientGraph):
    """A batch's gradient and its derivative, and its loss."""

    def _loss(self, risk: EmpiricalRisk, leaves: dict[str, Tensor], batch: Any, count: int) -> Tensor:
        self.loss = minibatch_loss(risk, leaves, batch, count)
        return self.loss

    def gradient(self) -> Tensor:
        """g_B, (P,)."""
        if not self.loss.requires_grad:
            return self._space.flatten([None] * len(self._leaves))
        return self._space.flatten(
            torch.autograd.grad(self.loss, self._leaves, retain_graph=True, allow_unused=True)
        ).detach()


class _Passes:
    """Counts batches for the progress callback."""

    def __init__(self, progress: Progress | None, total: int):
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, note: str) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total, note)


def _terms(risk: EmpiricalRisk, tick: _Passes) -> _Terms:
    """Two passes over the batches at the model's parameters: g_B and H_B g_B, then H_B g."""
    zeros = torch.zeros(risk.space.size, dtype=risk.accumulation_dtype, device=risk.device)
    gradient, units, penalty, curved = (zeros.clone() for _ in range(4))
    loss = square = pairs = 0.0
    graphs = KeptGraphs(risk, _BatchGraph)
    with risk.evaluating():
        for graph in graphs:
            g = graph.gradient()
            graph.add_products(g.unsqueeze(0), penalty.unsqueeze(0))
            norm = float(torch.linalg.vector_norm(g, dtype=torch.float64))
            gradient += g
            units += g / norm if norm else g
            loss, square, pairs = loss + float(graph.loss.detach()), square + norm**2, pairs + (norm > 0)
            del graph
            tick("gradients of single batches")
    ranks = risk.ranks
    num, loss, square, pairs = ranks.total(risk.num_batches, loss, square, pairs)
    gradient, units, penalty = (ranks.sum(vector) for vector in (gradient / num, units, penalty / num))
    with risk.evaluating():
        for graph in graphs:
            graph.add_products(gradient.to(risk.dtype).unsqueeze(0), curved.unsqueeze(0))
            del graph
            tick("product with the mean gradient")
    norms = [float(torch.linalg.vector_norm(v.double())) for v in (gradient, units, penalty, ranks.sum(curved))]
    is_zero = norms[0] <= 10 * torch.finfo(risk.dtype).eps * math.sqrt(square / num) or norms[2] == 0
    cosine = math.nan if is_zero else float(gradient.double() @ penalty.double()) / (norms[0] * norms[2])
    return _Terms(
        loss=loss / num,
        square=square / num,
        norm=norms[0],
        penalty=norms[2],
        curved=norms[3] / num,
        # ‖Σ u_B‖² is the sum of the cosines of all pairs, a batch with itself among them; a zero gradient counts 0.
        batch_cosine=(norms[1] ** 2 - pairs) / (num * (num - 1)) if num > 1 else math.nan,
        penalty_cosine=cosine,
    )


def _state(point: Solution | Snapshot) -> Solution:
    return point.weights if isinstance(point, Snapshot) else point
