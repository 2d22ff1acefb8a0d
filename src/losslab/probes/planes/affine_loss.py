"""The loss at thousands of points of one line or plane: data read once, weights written in place, exact shortcuts."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from losslab.memory import free_bytes
from losslab.operators import batches as kinds
from losslab.operators.batch_statistics import batch_statistics
from losslab.operators.risk import EmpiricalRisk
from losslab.probes.planes import folding
from losslab.probes.planes.folding import Affine, Given

First = list[tuple[Given, list[Affine]]]  # modules that stand for first layers, with what these give on each batch
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}  # of the loss: what rounding explains far from a minimum
_SHARE = 4  # of the free memory: data and first layers' outputs may each take a quarter


class AffineLoss:
    """(a, b) ↦ L(θ + a·d₁ + b·d₂), many times. The twin of the plain loop `risk.loss_at(θ + a·d₁ + b·d₂)`.

    In eval mode, and without `recalibrate`, a copy of the network is called whose weights are written in place. In it
    BatchNorm is folded and first layers are multiplied once for all points (`folding`). It must give the
    plain loop's loss at the places `check`, else it is not used. The same coordinates give the same bits, whatever was
    asked before.

    Args:
        risk: Whose loss.
        origin: θ, (P,).
        directions: One or two, (P,).
        check: Coordinates (a, b).
        recalibrate: BatchNorm's statistics computed anew at each point (a second pass).

    Cost: one pass for each call, less where there are shortcuts; before, two passes, and two for each place in `check`.
    """

    def __init__(
        self,
        risk: EmpiricalRisk,
        origin: Tensor,
        directions: Sequence[Tensor],
        *,
        check: Sequence[tuple[float, float]] = (),
        recalibrate: bool = False,
    ):
        self.risk, self.recalibrate = held(risk), recalibrate
        self._point = Affine(origin, directions)
        self._quick: _Quick | None = None
        if risk.mode == "eval" and not recalibrate and risk.dtype in _TOLERANCE:
            self._quick = _quick(self.risk, origin, directions)
            # Every process takes part: its sum is needed, whether or not it has such a copy itself.
            if risk.ranks.any(self._quick is not None) and not all(self._agrees(a, b) for a, b in check):
                self._quick = None

    @property
    def kind(self) -> str:
        """How it is computed: what the last bits of a loss depend on."""
        return "plain" if self._quick is None else "quick"

    @torch.no_grad()
    def __call__(self, alpha: float, beta: float = 0.0) -> float:
        """The loss there; NaN or Inf where it is."""
        if self._quick is not None:
            return float(self.risk.ranks.sum(self._quick.share(alpha, beta)))
        return self.plain(alpha, beta)

    @torch.no_grad()
    def plain(self, alpha: float, beta: float = 0.0) -> float:
        """The same from the network as it is."""
        point = self._point.at(alpha, beta)
        return self.risk.loss_at(point, batch_statistics(self.risk, point) if self.recalibrate else None)

    def _agrees(self, alpha: float, beta: float) -> bool:
        quick, plain = self(alpha, beta), self.plain(alpha, beta)
        if not (math.isfinite(quick) and math.isfinite(plain)):
            return math.isnan(quick) == math.isnan(plain)
        return abs(quick - plain) <= _TOLERANCE[self.risk.dtype] * abs(plain)


def held(risk: EmpiricalRisk) -> EmpiricalRisk:
    """The same risk with its batches on the device, where they fit into a quarter of the free memory; else as it is."""
    budget, batches = free_bytes(risk.device) // _SHARE, []
    with risk.evaluating():
        for batch, _ in risk.read():
            batches.append(batch)
            budget -= _bytes(kinds.tensors_of(batch))
            if budget < 0:
                return risk
    return risk.held_as(batches)


class _Quick:
    """A copy of the network with shortcuts, on batches that are held.

    Args:
        risk: Whose data and loss function.
        network: The copy.
        weights: All its parameters that move, as one vector; they are views of it.
        first: Modules that stand for first layers, with what those give on each batch.
    """

    def __init__(self, risk: EmpiricalRisk, network: nn.Module, weights: Affine | None, first: First):
        self.risk, self.network, self.weights, self.first = risk, network, weights, first
        with risk.evaluating():
            self.batches = [(batch, risk.batch_weight(count)) for batch, count in risk.read()]

    def share(self, alpha: float, beta: float) -> Tensor:
        """This process's share of the loss."""
        risk = self.risk
        if self.weights is not None:
            self.weights.at(alpha, beta)
        total = torch.zeros((), dtype=torch.float64, device=risk.device)
        with risk.evaluating():
            for index, (batch, weight) in enumerate(self.batches):
                for module, outputs in self.first:
                    module.outputs = outputs[index].at(alpha, beta)
                total += _loss(risk, self.network, batch) * weight
        return total


def _quick(risk: EmpiricalRisk, origin: Tensor, directions: Sequence[Tensor]) -> _Quick | None:
    """The network's copy; None where it cannot be copied, changes itself, or there are no data here."""
    if not isinstance(risk.batches, list) or not risk.batches:
        return None
    try:
        network = copy.deepcopy(risk.model).eval()
    except (RuntimeError, TypeError):  # some modules cannot be copied
        return None
    moving = _moving(risk, network, origin, directions)
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with risk.evaluating():
        batch = next(iter(risk.read()))[0]
        found = folding.find(network, lambda module: _loss(risk, module, batch))
    if any(not torch.equal(buffer, buffers[name]) for name, buffer in network.named_buffers()):
        return None  # it changes itself in eval mode too
    with torch.no_grad():
        network, folded = _fold(network, found, moving)
        network, first = _multiply(risk, network, [folded.get(layer, layer) for layer in found.first], moving)
        return _Quick(risk, network, _connect(network, moving), first)


def _moving(
    risk: EmpiricalRisk, network: nn.Module, origin: Tensor, directions: Sequence[Tensor]
) -> dict[nn.Parameter, Affine]:
    """How each chosen parameter of the copy moves."""
    views = [risk.space.views(vector) for vector in (origin, *directions)]
    parameters = [network.get_parameter(name) for name in risk.space.names]
    return {p: Affine(base, moves) for p, base, *moves in zip(parameters, *views, strict=True)}


def _fold(
    network: nn.Module, found: folding.Found, moving: dict[nn.Parameter, Affine]
) -> tuple[nn.Module, dict[nn.Module, nn.Module]]:
    """The network without the BatchNorm layers that can be folded, and what the layers before them became."""
    folded = {}
    for layer, norm in found.normed:
        new = folding.fold(layer, norm, moving)
        if new is not None:
            network = folding.replace(folding.replace(network, layer, new), norm, nn.Identity())
            folded[layer] = new
    return network, folded


def _multiply(
    risk: EmpiricalRisk, network: nn.Module, layers: Sequence[nn.Module], moving: dict[nn.Parameter, Affine]
) -> tuple[nn.Module, First]:
    """The network with known outputs in place of first layers, as far as these fit into memory."""
    found: First = []
    budget = free_bytes(risk.device) // _SHARE
    for layer, inputs in zip(layers, _inputs(risk, network, layers), strict=True):
        assert isinstance(layer, nn.Linear)
        # The base, both directions, their sum for a row and for a point.
        budget -= 5 * _bytes(inputs) * layer.out_features // layer.in_features
        if budget < 0 or len(inputs) != risk.num_batches:
            continue
        given = Given()
        found.append((given, [folding.outputs_of(layer, x, moving) for x in inputs]))
        network = folding.replace(network, layer, given)
    return network, found


def _inputs(risk: EmpiricalRisk, network: nn.Module, layers: Sequence[nn.Module]) -> list[list[Tensor]]:
    """What each layer gets for each batch. Cost: one forward pass."""
    seen: list[list[Tensor]] = [[] for _ in layers]

    def noting(inputs: list[Tensor]) -> Callable[..., None]:
        return lambda module, arguments: inputs.append(arguments[0])

    handles = [layer.register_forward_pre_hook(noting(inputs)) for layer, inputs in zip(layers, seen, strict=True)]
    try:
        if layers:
            with risk.evaluating():
                for batch, _ in risk.read():
                    _loss(risk, network, batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _connect(network: nn.Module, moving: dict[nn.Parameter, Affine]) -> Affine | None:
    """One vector of all parameters that are left and move; the network's are views of it from now on."""
    left = [parameter for parameter in network.parameters() if parameter in moving]
    if not left:
        return None
    pieces = [[moving[p].base, *moving[p].directions] for p in left]
    base, *directions = (torch.cat([tensor.reshape(-1) for tensor in row]) for row in zip(*pieces, strict=True))
    weights = Affine(base, directions)
    point = weights.at(0.0, 0.0)
    for parameter, piece in zip(left, point.split([p.numel() for p in left]), strict=True):
        parameter.data = piece.view(parameter.shape)
    return weights


def _loss(risk: EmpiricalRisk, network: nn.Module, batch: Any) -> Tensor:
    output = kinds.call_model(network, batch, risk.model)
    return kinds.batch_loss(risk.loss_fn, output, kinds.targets_of(batch))


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
