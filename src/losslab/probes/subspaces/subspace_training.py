"""Training in a subspace: θ = θ₀ + P v, and only v moves."""

import contextlib
import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from losslab.operators.minibatches import minibatch_loss, minibatches
from losslab.operators.risk import EmpiricalRisk
from losslab.probes.subspaces.subspaces import Subspace

MakeOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]
State = dict[str, Any]  # what training goes on from: the steps done, v, the optimizer's state
AfterStep = Callable[[int, float, Callable[[], State]], None]


def train_in_subspace(
    risk: EmpiricalRisk,
    start: Tensor,
    subspace: Subspace,
    make_optimizer: MakeOptimizer,
    *,
    steps: int,
    seed: int = 0,
    state: State | None = None,
    after_step: AfterStep | None = None,
) -> Tensor:
    """Minimise L(θ₀ + P v) over v, from v = 0, by any optimizer, one batch a step.

    The model is in training mode, so BatchNorm uses each batch's statistics and dropout acts. The gradient with respect
    to v is Pᵀ∇L; no P × d matrix and no graph of the projection are needed.

    Args:
        risk: Loss, model and batches.
        start: θ₀, (P,).
        subspace: P.
        make_optimizer: `lambda params: torch.optim.Adam(params, lr=1e-3)`; `params` is `[v]`. Weight decay acts on v.
        steps: Of the optimizer.
        seed: Of the batches' order and of dropout.
        state: Go on from it, bit for bit.
        after_step: Called with the number of steps done, the batch's loss before the step, and a function that gives
            the state of now.

    Returns:
        v, (d,); NaN where a loss was not finite, which ends the training.

    Raises:
        TypeError: `make_optimizer` does not return an optimizer.
    """
    v = nn.Parameter(start.new_zeros(subspace.dimension))
    optimizer = make_optimizer([v])
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: expected a function that returns one of torch's, got {type(optimizer).__name__}")
    first = 0
    if state is not None:
        first = state["step"]
        v.data.copy_(state["v"])
        optimizer.load_state_dict(state["optimizer"])
    training = copy.copy(risk)
    training.mode = "train"
    with contextlib.closing(minibatches(training, seed, first)) as stream:
        for step in range(first + 1, steps + 1):
            batch, count = next(stream)
            losses: list[float] = []

            def evaluate(batch: Any = batch, count: int = count, losses: list[float] = losses) -> Tensor:
                """The batch's loss, and its gradient in `v.grad`: what `Optimizer.step` takes."""
                leaves = training.leaves(start + subspace.matvec(v.detach()))
                loss = minibatch_loss(training, leaves, batch, count)
                gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
                v.grad = subspace.rmatvec(training.space.flatten(gradients))
                losses.append(float(loss.detach()))
                return loss.detach()

            optimizer.step(evaluate)  # type: ignore[arg-type]  # the stubs want a float
            if not math.isfinite(losses[0]):
                v.data.fill_(math.nan)
            if after_step is not None:
                after_step(step, losses[0], lambda: _state(step, v, optimizer))  # noqa: B023  # called at once
            if not math.isfinite(losses[0]):
                break
    return v.detach().clone()


def _state(step: int, v: Tensor, optimizer: torch.optim.Optimizer) -> State:
    return {"step": step, "v": v.detach().clone(), "optimizer": copy.deepcopy(optimizer.state_dict())}
