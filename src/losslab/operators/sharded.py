"""The Hessian of a model whose parameters lie in parts on several processes (FSDP2), vectors in the same parts."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from losslab.operators import batches as kinds
from losslab.operators.base import LinearOperator
from losslab.operators.determinism import nonfinite_message
from losslab.operators.finite_difference import Differences
from losslab.operators.product_error import dominant_direction
from losslab.random import preserved_random_states
from losslab.ranks import Ranks, Split


class ShardedRisk:
    """L(θ) of a model under `fully_shard`, with θ and ∇L in the parts in which the model's parameters lie.

    The hooks of FSDP gather a layer's parameters when it is run and know nothing of second derivatives or of
    `functional_call`. So the gradient is that of a training step, taken with the model's own parameters moved in place
    and put back, bit for bit; `.grad`, modes and random states are as before.

    Args:
        model: After `fully_shard`, on a one-dimensional mesh of all processes.
        loss_fn: As for EmpiricalRisk.
        batches: This process's own; each process has at least one batch, not necessarily as many as the others.
        mode: "eval" or "train".

    Raises:
        TypeError: Not an FSDP2 model, or one with parameters that are not sharded over all processes.
        ValueError: A process without data.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: kinds.LossFunction | None,
        batches: Iterable[Any],
        *,
        mode: Literal["eval", "train"] = "eval",
    ):
        kinds.check_reiterable(batches)
        self.model, self.loss_fn, self.batches, self.mode = model, loss_fn, batches, mode
        self.ranks = Ranks.world()
        self._parameters = _sharded_parameters(model, self.ranks)
        self._shapes = [_local(p).shape for p in self._parameters]
        self._sizes = [shape.numel() for shape in self._shapes]
        self.dtype, self.device = self._parameters[0].dtype, _local(self._parameters[0]).device
        self._reduction = kinds.reduction_of(loss_fn)
        counts = [kinds.count_examples(batch) for batch in batches]
        self.num_examples = int(self.ranks.total(sum(counts))[0])
        if self.ranks.any(not counts):
            raise ValueError("batches: expected at least one batch on each process, got a process with none")
        self._passes = int(max(self.ranks.each(len(counts))))
        sizes = [int(size) for size in self.ranks.each(sum(self._sizes))]
        self.split = Split(sum(sizes), self.ranks, sizes)

    def vector(self) -> Tensor:
        """A copy of this process's part of θ."""
        return torch.cat([_local(p.detach()).reshape(-1) for p in self._parameters])

    def gradient_at(self, part: Tensor) -> Tensor:
        """This process's part of ∇L at the point of which it holds this part. Cost: one g."""
        with self._moved(part):
            for index, (batch, count, used) in enumerate(self._read()):
                output = kinds.call_model(self.model, batch, self.model)
                loss = kinds.batch_loss(self.loss_fn, output, kinds.targets_of(batch))
                if not math.isfinite(float(loss.detach())):
                    raise ValueError(nonfinite_message("loss", index, float(loss.detach()), batch))
                # FSDP averages gradients over the processes; the risk is a mean over all their examples.
                weight = self.ranks.count * (count if self._reduction == "mean" else 1) / self.num_examples
                (loss * (weight if used else 0.0)).backward()
            grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self._parameters]
            return torch.cat([_local(grad).reshape(-1) for grad in grads])

    def _read(self) -> Iterator[tuple[Any, int, bool]]:
        """(batch, its examples, whether it counts): every pass gathers parameters, so who has fewer batches repeats."""
        done = 0
        while done < self._passes:
            counts = done == 0
            for batch in self.batches:
                if done == self._passes:
                    return
                done += 1
                yield kinds.to_device(batch, self.device), kinds.count_examples(batch), counts

    @contextmanager
    def _moved(self, part: Tensor) -> Iterator[None]:
        before, grads = self.vector(), [p.grad for p in self._parameters]
        modes = [(module, module.training) for module in self.model.modules()]
        with preserved_random_states(0, kinds.generators_of(self.batches)):
            try:
                self._assign(part)
                for p in self._parameters:
                    p.grad = None
                self.model.train(self.mode == "train")
                yield
            finally:
                self._assign(before)
                for p, grad in zip(self._parameters, grads, strict=True):
                    p.grad = grad
                for module, training in modes:
                    module.training = training

    @torch.no_grad()
    def _assign(self, part: Tensor) -> None:
        for p, piece, shape in zip(self._parameters, part.split(self._sizes), self._shapes, strict=True):
            _local(p).copy_(piece.view(shape))


class ShardedHessian(LinearOperator):
    """The Hessian of an FSDP2 model, by central differences of its gradient: the exact product cannot be had.

    Every process makes the same calls and holds, of θ and of every vector of a solver, the part that lies in its own
    parameters (`split`): `matmat_part` never forms a whole vector. A whole one, as `eigenpairs` returns it, is the
    processes' parts one after the other. Step and `precision` are found as in `FiniteDifferenceHessian`.

    Cost: 2 g a product; memory a gradient's, and a few vectors of P/processes numbers. Making it: up to 30 g.

    Raises:
        TypeError, ValueError: See `ShardedRisk`; and parameters in half precision.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: kinds.LossFunction | None,
        batches: Iterable[Any],
        *,
        mode: Literal["eval", "train"] = "eval",
        seed: int | torch.Generator = 0,
    ):
        self.risk = ShardedRisk(model, loss_fn, batches, mode=mode)
        self.size, self.dtype, self.device = self.risk.split.size, self.risk.dtype, self.risk.device
        self._differences = Differences(self.risk.gradient_at, self.risk.vector(), self.risk.split)
        self._differences.find_step(dominant_direction(self, seed))

    @property
    def precision(self) -> float:
        """The measured error of a product."""
        return self._differences.precision

    @property
    def split(self) -> Split:
        """As the parameters lie on the processes."""
        return self.risk.split

    def matmat_part(self, part: Tensor) -> Tensor:
        """This process's rows of HV from its rows of V."""
        return self._differences.products(part)

    def _matmat(self, matrix: Tensor) -> Tensor:
        return self.split.whole(self.matmat_part(self.split.part(matrix.mT).mT).mT).mT


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a distributed tensor, sharing memory."""
    assert isinstance(tensor, DTensor)
    return tensor.to_local()


def _sharded_parameters(model: nn.Module, ranks: Ranks) -> list[nn.Parameter]:
    """The trainable ones, or a TypeError that says which does not lie in parts on all processes."""
    if not isinstance(model, FSDPModule):
        kind = type(model).__name__
        raise TypeError(f"model: expected one after fully_shard(model), got a plain {kind}; use Hessian")
    chosen = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, p in chosen.items():
        placed = p.placements if isinstance(p, DTensor) and p.device_mesh.size() == ranks.count else ("elsewhere",)
        if len(placed) != 1 or not isinstance(placed[0], Shard):
            raise TypeError(
                f"model: expected parameters sharded over all {ranks.count} processes, got {name!r} placed {placed}; "
                "use fully_shard on a one-dimensional mesh"
            )
    return list(chosen.values())
