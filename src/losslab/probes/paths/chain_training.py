"""SGD on the free control points of a chain: one minibatch and one position on the curve a step."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from losslab.operators.batch_statistics import own_batch_statistics
from losslab.operators.minibatches import minibatch_loss, minibatches
from losslab.operators.risk import EmpiricalRisk
from losslab.probes.paths.chains import Chain
from losslab.random import make_generator


@dataclass(frozen=True)
class CurveOptions:
    """How the curve is trained and measured.

    Attributes:
        steps: Minibatches. The paper's networks took 10⁵; the training losses show whether these were enough.
        lr: Learning rate: constant for half of the steps, then falling linearly to a hundredth at 90 %.
        momentum: Of SGD.
        weight_decay: The factor λ of ½‖φ(t)‖²; best what the two solutions were trained with.
        num_points: Positions at which the finished curve is measured.
    """

    steps: int = 1000
    lr: float = 0.03
    momentum: float = 0.9
    weight_decay: float = 5e-4
    num_points: int = 61

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("num_points", 3)):
            if type(getattr(self, name)) is not int or getattr(self, name) < least:
                raise ValueError(f"{name}: expected a number >= {least}, got {getattr(self, name)!r}")
        if not self.lr > 0:
            raise ValueError(f"lr: expected a number > 0, got {self.lr!r}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: expected a number in [0, 1), got {self.momentum!r}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay: expected a number >= 0, got {self.weight_decay!r}")

    def lr_at(self, step: int) -> float:
        """The learning rate of a step (Garipov et al. 2018, by the schedule of their code)."""
        share = step / self.steps
        return self.lr * (1 - 0.99 * min(max(share - 0.5, 0.0) / 0.4, 1.0))


class _State(NamedTuple):
    """Where SGD is; replaced as a whole, so that no interruption leaves half a step."""

    step: int
    points: Tensor  # (K, P)
    velocity: Tensor  # (K − 2, P)


class ChainTraining:
    """min over the free control points of E_{t ~ U(0,1)} [L(φ(t)) + ½λ‖φ(t)‖²].

    Attributes:
        losses: (steps,) of each step's minibatch at its t, without the L2 term; NaN where not taken yet.
        finite: False where a loss or a gradient was not: training ended at the last curve before it.
    """

    def __init__(self, risk: EmpiricalRisk, chain: Chain, options: CurveOptions, seed: int):
        self.risk, self.kind, self.options, self.seed = risk, chain.kind, options, seed
        self._state = _State(0, chain.points, torch.zeros_like(chain.points[1:-1]))
        self.losses = np.full(options.steps, np.nan)
        self.finite = True

    @property
    def step(self) -> int:
        """Steps taken."""
        return self._state.step

    @property
    def chain(self) -> Chain:
        """The curve as it is."""
        return Chain(self.kind, self._state.points)

    def run(self, after_step: Callable[[float], None]) -> None:
        """The remaining steps, each followed by `after_step(loss)`. Cost: a minibatch gradient each."""
        # All positions at once: going on from a file needs no state of the generator.
        ts = torch.rand(self.options.steps, generator=make_generator(self.seed), dtype=torch.float64).tolist()
        stream = minibatches(self.risk, self.seed, start=self.step)
        with contextlib.closing(stream) as batches:
            while self.finite and self.step < self.options.steps:
                loss = self._take_step(ts[self.step], *next(batches))
                if self.finite:
                    after_step(loss)

    def arrays(self) -> dict[str, np.ndarray]:
        """All that `restore` needs to go on from here, bit for bit."""
        step, points, velocity = self._state
        numbers = {"step": np.array(step), "finite": np.array(self.finite), "training_losses": self.losses}
        return numbers | {"points": points.cpu().numpy(), "velocity": velocity.cpu().numpy()}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Go on from what `arrays` gave."""
        points, velocity = (torch.from_numpy(arrays[name]).to(self._state.points) for name in ("points", "velocity"))
        self._state = _State(int(arrays["step"]), points, velocity)
        self.losses, self.finite = arrays["training_losses"], bool(arrays["finite"])

    def _take_step(self, t: float, batch: Any, count: int) -> float:
        step, points, velocity = self._state
        weights = torch.as_tensor(self.chain.weights(t)).to(points)
        loss, gradient = self._gradient(weights @ points, batch, count)
        self.losses[step] = loss
        self.finite = math.isfinite(loss) and bool(gradient.isfinite().all())
        if self.finite:
            # ∂φ(t)/∂wₖ = cₖ(t): each control point's gradient is its weight times that at φ(t).
            velocity = self.options.momentum * velocity + torch.outer(weights[1:-1], gradient)
            points = points.clone()
            points[1:-1] -= self.options.lr_at(step) * velocity
            self._state = _State(step + 1, points, velocity)
        return loss

    def _gradient(self, point: Tensor, batch: Any, count: int) -> tuple[float, Tensor]:
        """The minibatch's loss at φ(t), and the gradient of it with the L2 term, (P,)."""
        leaves = self.risk.leaves(point.to(self.risk.dtype))
        with own_batch_statistics(self.risk.model), torch.enable_grad():
            loss = minibatch_loss(self.risk, leaves, batch, count)
            grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        gradient = self.risk.space.flatten(grads).to(point)
        return float(loss.detach()), gradient.add_(point, alpha=self.options.weight_decay)
