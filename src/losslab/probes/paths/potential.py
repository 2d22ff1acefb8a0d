"""Losses and gradients at many points at once: what an elastic band moves in, a network's loss or any function."""

import contextlib
from collections.abc import Callable, Generator, Iterable
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.func import vmap

from losslab.operators.batch_statistics import batch_statistics, own_batch_statistics
from losslab.operators.minibatches import minibatches
from losslab.operators.risk import EmpiricalRisk
from losslab.random import make_generator

Found = TypeVar("Found")
Slope = Callable[[Tensor], tuple[Tensor, Tensor]]


class Potential(Protocol):
    """A function of points in R^P that a band can relax in."""

    def losses(self, points: Tensor) -> Tensor:
        """What a path is judged by, at points (k, P): (k,) in float64."""

    def slopes(self, seed: int, start: int) -> Generator[Slope, None, None]:
        """Without end, one function for each step from step number `start` on.

        It takes a path (n, P) and returns the losses at all its pivots, (n,), and the gradients at the inner ones,
        (n−2, P), all of them on the same data. The same seed and step give the same function.
        """


class NetworkPotential:
    """A network's loss as a potential. All points share one read of each batch.

    In a network whose parameters belong to linear layers alone, all pivots go through it as one stack
    (`torch.func.vmap`: their products become one batched product), which pays where layers are small and pivots many
    (benchmarks/results/landscape_band.md). Convolutions would become grouped ones, which are slower than the loop on a
    CPU, and so would attention: their pivots go one after another through the same batch; so do those of a network that
    `vmap` cannot trace, or for whose stack the memory is too small.

    BatchNorm's running statistics are no coordinates. A step normalises each batch by its own statistics, as training
    does; what is reported is computed with statistics averaged over the data for each point (`batch_statistics`).

    Args:
        risk: Model, loss and data.
        whole: Take gradients over all data; else each step takes one batch, the same for all pivots.
    """

    def __init__(self, risk: EmpiricalRisk, *, whole: bool = False):
        self.risk, self.whole = risk, whole
        self._stacked = all(isinstance(layer, nn.Linear) for layer in risk.model.modules() if layer._parameters)

    @torch.no_grad()
    def losses(self, points: Tensor) -> Tensor:
        """L over all data, (k,). Cost: k forward passes in one read of the data, 2k where there is BatchNorm."""
        points = points.to(self.risk.dtype)
        buffers = [batch_statistics(self.risk, point) for point in points]
        total = torch.zeros(len(points), dtype=torch.float64, device=points.device)
        with self.risk.evaluating():
            for batch, count in self.risk.read():
                total += self._shares(points, batch, count, buffers)
        return self.risk.ranks.sum(total)

    def slopes(self, seed: int, start: int) -> Generator[Slope, None, None]:
        """One function a step; with `whole` always the same one. The seed decides which batch is the first.

        Use it inside `contextlib.closing`.
        """
        while self.whole:
            yield self._on_all
        first = int(torch.randint(self.risk.num_batches, (), generator=make_generator(seed)))
        with contextlib.closing(minibatches(self.risk, seed, first + start)) as batches:
            for batch in batches:
                yield partial(self._on, [batch])

    def _on_all(self, path: Tensor) -> tuple[Tensor, Tensor]:
        with self.risk.evaluating():
            return self._on(self.risk.read(), path)

    def _on(self, batches: Iterable[tuple[Any, int]], path: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss and gradients over some batches."""
        points = path.to(self.risk.dtype)
        losses, gradients, seen = torch.zeros(len(path), dtype=torch.float64, device=path.device), None, 0
        with own_batch_statistics(self.risk.model), torch.enable_grad():
            for batch, count in batches:
                shares, slopes = self._gradients(points, batch, count)
                losses += shares
                gradients = slopes.to(path.dtype) if gradients is None else gradients.add_(slopes)
                seen += count
        ranks = self.risk.ranks
        gradients = torch.zeros_like(path[1:-1]) if gradients is None else gradients  # a process without data
        scale = self.risk.num_examples / ranks.total(seen)[0]  # shares are parts of the mean over all examples
        return ranks.sum(losses).mul_(scale), ranks.sum(gradients).mul_(scale)

    # -- one batch: shares of L, (n,), and of the inner pivots' gradients, (n−2, P) ------------------------------

    def _shares(self, points: Tensor, batch: Any, count: int, buffers: list[dict[str, Tensor]]) -> Tensor:
        shares = self._attempt(self._stacked_shares, points, batch, count)
        if shares is not None:
            return shares
        views = [self.risk.space.named_views(point.clone()) for point in points]
        return torch.stack(
            [self.risk.batch_share(view | own, batch, count) for view, own in zip(views, buffers, strict=True)]
        )

    def _gradients(self, points: Tensor, batch: Any, count: int) -> tuple[Tensor, Tensor]:
        found = self._attempt(self._stacked_gradients, points, batch, count)
        if found is not None:
            return found
        with torch.no_grad():
            first, last = self._shares(points[[0, -1]], batch, count, [{}, {}])
        shares, gradients = zip(*(self._gradient(point, batch, count) for point in points[1:-1]), strict=True)
        return torch.stack([first, *shares, last]), torch.stack(gradients)

    def _gradient(self, point: Tensor, batch: Any, count: int) -> tuple[Tensor, Tensor]:
        leaves = self.risk.leaves(point.clone())
        share = self.risk.batch_share(leaves, batch, count)
        gradient = torch.autograd.grad(share, list(leaves.values()), allow_unused=True)
        return share.detach(), self.risk.space.flatten(gradient)

    def _stacked_shares(self, points: Tensor, batch: Any, count: int) -> Tensor:
        return self._stack(self._leaves(points), batch, count)

    def _stacked_gradients(self, points: Tensor, batch: Any, count: int) -> tuple[Tensor, Tensor]:
        leaves = {name: tensor.requires_grad_() for name, tensor in self._leaves(points).items()}
        shares = self._stack(leaves, batch, count)  # the ends too: a pass of their own takes longer
        gradients = torch.autograd.grad(shares.sum(), list(leaves.values()), allow_unused=True)
        slopes = torch.zeros_like(points[1:-1])
        for place, gradient in zip(slopes.split(self.risk.space.sizes, dim=1), gradients, strict=True):
            if gradient is not None:
                place.view_as(gradient[1:-1]).copy_(gradient[1:-1])
        return shares.detach(), slopes

    def _leaves(self, points: Tensor) -> dict[str, Tensor]:
        """The points' parameters by name, one stack (n, …) each.

        Slices of one (n, P) would make the backward pass fill an array of that size for each of them.
        """
        space = self.risk.space
        pieces = points.detach().split(space.sizes, dim=1)
        stacks = [piece.reshape(-1, *shape) for piece, shape in zip(pieces, space.shapes, strict=True)]
        return dict(zip(space.names, stacks, strict=True))

    def _stack(self, leaves: dict[str, Tensor], batch: Any, count: int) -> Tensor:
        return vmap(lambda parameters: self.risk.batch_share(parameters, batch, count))(leaves)

    def _attempt(self, together: Callable[..., Found], *arguments: Any) -> Found | None:
        """What the stacked pass returns; None, from then on, where it does not work."""
        if self._stacked:
            try:
                return together(*arguments)
            except RuntimeError:  # vmap cannot trace it, or memory ran out; the network's own errors come again
                self._stacked = False
        return None
