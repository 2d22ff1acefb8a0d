"""A plane of losses: against as many plain forward passes over data in memory, and against loss-landscapes.

A plain pass is what one would write: the batches on the device, `torch.no_grad()`, the model called, the mean of the
batches' losses; the weights do not even move. losslab's time is that of the whole call `plane(risk, resolution=…)`:
directions, weights of every point, checks of its shortcuts. loss-landscapes (3.0.6 or 3.0.7, 2019) is called
as its documentation shows: `random_plane(model, Loss(criterion, x, y), …)`, all examples in one batch.
"""

import copy
import time
from collections.abc import Callable

import numpy as np
import torch
from data import Batches, in_batches
from table import installed, markdown, spread
from torch import Tensor, nn

from losslab import EmpiricalRisk, plane
from losslab.probes.planes.directions import filter_normalized
from losslab.random import make_generator
from losslab.studies.models import SimpleCNN

try:
    from loss_landscapes import random_plane
    from loss_landscapes.metrics import Loss
except ImportError:  # its rows say so
    random_plane = None


def mlp(inputs: int) -> nn.Module:
    hidden = [nn.Linear(inputs, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(200, 10))


# name -> a network, the shape of an input, examples, batch size, what the ratio is to be at most
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int, float]] = {
    "CNN on 1×8×8": (lambda: SimpleCNN(1, 10, width=16), (1, 8, 8), 512, 128, 1.1),
    "CNN with BatchNorm on 1×8×8": (lambda: SimpleCNN(1, 10, width=16, batch_norm=True), (1, 8, 8), 512, 128, 1.1),
    "CNN on 3×32×32": (lambda: SimpleCNN(3, 10, width=16), (3, 32, 32), 128, 128, 1.1),
    "CNN with BatchNorm on 3×32×32": (lambda: SimpleCNN(3, 10, width=16, batch_norm=True), (3, 32, 32), 128, 128, 1.1),
    "MLP 784-200-200-10": (lambda: mlp(784), (784,), 2000, 500, 0.4),
    "MLP 3072-200-200-10": (lambda: mlp(3072), (3072,), 2000, 500, 0.4),
}
HEADER = ["network", "losslab, s", "plain passes, s", "ratio", "asked", "loss-landscapes, s", "× losslab", "difference"]


def plane_section(resolution: int = 51, rounds: int = 3, share: float = 1.0) -> list[str]:
    """The section's lines: one row a case; `share` of the examples."""
    rows = [_row(name, resolution, rounds, share) for name in CASES]
    return [
        f"- {resolution}×{resolution} points, float32, {rounds} rounds in turn: median (smallest–largest); ratios are"
        " of the same round",
        "- difference: of losslab's losses from `risk.loss_at`, relative, largest of nine points",
        f"- loss-landscapes {installed('loss-landscapes')}",
        "",
        *markdown(HEADER, rows),
    ]


def _row(name: str, resolution: int, rounds: int, share: float) -> list[str]:
    build, shape, examples, batch_size, target = CASES[name]
    torch.manual_seed(0)
    model = build().train()
    x, y = torch.randn(max(int(examples * share), 2), *shape), torch.arange(max(int(examples * share), 2)) % 10
    with torch.no_grad():
        model(x)  # BatchNorm's statistics
    model.eval()
    batches = in_batches(x, y, batch_size)
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), batches, check=False)
    points, times = resolution**2, {"losslab": [], "plain": [], "peer": []}
    _passes(model, batches, 2)
    for _ in range(rounds):
        times["plain"].append(_seconds(lambda: _passes(model, batches, points)))
        times["losslab"].append(_seconds(lambda: plane(risk, resolution=resolution)))
        if random_plane is not None:
            times["peer"].append(_seconds(lambda: _peer(model, x, y, resolution)))
    ratio = [ours / plain for ours, plain in zip(times["losslab"], times["plain"], strict=True)]
    cells = [spread(times["losslab"], ".1f"), spread(times["plain"], ".1f"), spread(ratio, ".2f"), f"≤ {target}"]
    if random_plane is None:
        cells += ["not installed", "–"]
    else:
        against = [peer / ours for peer, ours in zip(times["peer"], times["losslab"], strict=True)]
        cells += [spread(times["peer"], ".1f"), spread(against, ".1f")]
    return [f"{name}, {len(y)} examples", *cells, f"{_difference(risk):.0e}"]


def _passes(model: nn.Module, batches: Batches, count: int) -> float:
    """So many plain forward passes over data in memory."""
    loss_fn, examples, loss = nn.CrossEntropyLoss(), sum(len(y) for _, y in batches), 0.0
    with torch.no_grad():
        for _ in range(count):
            loss = float(sum(loss_fn(model(x), y) * (len(y) / examples) for x, y in batches))
    return loss


def _peer(model: nn.Module, x: Tensor, y: Tensor, resolution: int) -> np.ndarray:
    """`random_plane` on a copy: it leaves the model displaced. Weights whose entries are zero would divide by zero."""
    metric = Loss(nn.CrossEntropyLoss(), x, y)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter[parameter == 0] = 1e-6
    return random_plane(moved, metric, distance=1, steps=resolution, normalization="filter", deepcopy_model=False)


def _difference(risk: EmpiricalRisk) -> float:
    """Between the plane and the plain loop over its points."""
    result, theta, generator = plane(risk, resolution=3), risk.space.vector(), make_generator(0)
    first = filter_normalized(risk.space, theta, generator)
    second = filter_normalized(risk.space, theta, generator, orthogonal_to=first)
    loop = [[risk.loss_at(theta + float(b) * second + float(a) * first) for a in result.alphas] for b in result.betas]
    return float(np.abs(result.losses / np.array(loop) - 1).max())


def _seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began
