"""Which weights a run is judged by: those that it trains, an exponential average of them, or the optimizer's own."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from losslab.operators.batch_statistics import batch_statistics
from losslab.operators.risk import EmpiricalRisk
from losslab.studies.checkpoint import saved_tensors
from losslab.studies.data import Batches
from losslab.studies.optimizers import evaluating, keeps_an_average

# Schedule-free's authors pass so many through the network before each evaluation (the README of their package).
BATCHES = 50


class Judged:
    """The weights that are evaluated and saved.

    Args:
        network: What is trained.
        optimizer: What trains it; schedule-free ones keep an average themselves.
        decay: Of the exponential average θ̄ ← dθ̄ + (1−d)θ after each step (Polyak & Juditsky 1992); floating-point
            buffers are averaged with it, others copied. None: no such average.
        examples: To train on. Where the optimizer keeps an average, BatchNorm's statistics are those of their first
            50 batches at that average: the network's own belong to the point where gradients are taken.

    Attributes:
        average: θ̄ by name; None without a decay.
    """

    def __init__(self, network: nn.Module, optimizer: Optimizer, decay: float | None, examples: Batches):
        self.network, self.optimizer, self.decay = network, optimizer, decay
        few = Batches(examples.split.head(BATCHES * examples.batch_size), examples.batch_size)
        self._risk = EmpiricalRisk(network, cross_entropy, few, check=False) if keeps_an_average(optimizer) else None
        self._statistics: dict[str, Tensor] | None = None  # of the present average
        self.average = None if decay is None else {n: t.clone() for n, t in saved_tensors(network).items()}

    @property
    def differ(self) -> bool:
        """Whether they are other ones than those in the network."""
        return self.average is not None or keeps_an_average(self.optimizer)

    @torch.no_grad()
    def update(self) -> None:
        """After a step of the optimizer."""
        self._statistics = None
        if self.average is None or self.decay is None:
            return
        pairs = [(self.average[name], tensor) for name, tensor in saved_tensors(self.network).items()]
        floating = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([mean for mean, _ in floating], [now for _, now in floating], 1 - self.decay)
        for mean, now in pairs:
            if not mean.is_floating_point():
                mean.copy_(now)

    @contextmanager
    def in_place(self) -> Iterator[dict[str, Tensor]]:
        """Inside, the network holds these weights; afterwards it is as it was, to the last bit.

        Yields:
            The weights that are trained, by name.
        """
        trained = {name: tensor.clone() for name, tensor in saved_tensors(self.network).items()} if self.differ else {}
        try:
            with evaluating(self.optimizer):
                _put(self.network, self.average or {})
                if self._risk is not None:
                    self._statistics = self._statistics or batch_statistics(self._risk, self._risk.space.vector())
                    _put(self.network, self._statistics)
                yield trained
        finally:
            _put(self.network, trained)


@torch.no_grad()
def _put(network: nn.Module, weights: dict[str, Tensor]) -> None:
    for name, tensor in saved_tensors(network).items():
        if name in weights:
            tensor.copy_(weights[name])
