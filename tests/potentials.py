"""Analytic potentials with known minima, saddles and paths, for bands that move in them; and two trained networks."""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from cases import normal
from losslab.operators.risk import EmpiricalRisk
from losslab.probes.partial import PartialFile
from losslab.probes.paths.band import Relaxation, straight
from losslab.probes.paths.band_schedule import ElasticBandOptions, schedule_of


class Analytic:
    """Any differentiable function of points (k, P) as a potential."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        self.function = function

    def losses(self, points):
        return self.function(points).double()

    def slopes(self, seed, start):
        while True:
            yield self.slope

    def slope(self, path):
        leaf = path.clone().requires_grad_()
        values = self.function(leaf)
        return values.detach(), torch.autograd.grad(values.sum(), leaf)[0][1:-1]


def muller_brown(points: Tensor) -> Tensor:
    """Müller & Brown (1979, Theor. Chim. Acta 53, 75)."""
    strength, a = (-200.0, -100.0, -170.0, 15.0), (-1.0, -1.0, -6.5, 0.7)
    b, c = (0.0, 0.0, 11.0, 0.6), (-10.0, -10.0, -6.5, 0.7)
    x0, y0 = (1.0, 0.0, -0.5, -1.0), (0.0, 0.5, 1.5, 1.0)
    x, y = points[:, 0], points[:, 1]
    terms = zip(strength, a, b, c, x0, y0, strict=True)
    return sum(s * torch.exp(i * (x - u) ** 2 + j * (x - u) * (y - v) + k * (y - v) ** 2) for s, i, j, k, u, v in terms)


MINIMUM_A, MINIMUM_B = (-0.5582236346, 1.4417258418), (0.6234994049, 0.0280377585)
MINIMUM_C = (-0.0500108230, 0.4666941049)
SADDLE_1, SADDLE_2 = -40.6648435087, -72.2489401123

VALLEY_END = 2.5 * math.pi, 1.0


def curvy_valley(points: Tensor) -> Tensor:
    """Its floor runs along y = sin x from one minimum (0) over the saddle (0, 0) (height 1) to the other."""
    x, y = points[:, 0], points[:, 1]
    return (y - torch.sin(x)) ** 2 + ((x / VALLEY_END[0]) ** 2 - 1) ** 2


def detour(points: Tensor) -> Tensor:
    """A narrow hill of height 1 on a flat plain, just before the end at (1, 0): there is a way around it."""
    x, y = points[:, 0], points[:, 1]
    return torch.exp(-(((x - 0.93) / 0.03) ** 2) - ((y - 0.01) / 0.1) ** 2)


def relaxation(
    function, start, end, num_nodes, schedule, *, resume=None, progress=None, seed=0, potential=None, **options
) -> Relaxation:
    """A band between two points, not yet relaxed."""
    ends = (torch.tensor(point, dtype=torch.float64) for point in (start, end))
    return Relaxation(
        potential or Analytic(function),
        straight(*ends, num_nodes),
        schedule_of(schedule),
        ElasticBandOptions(**options),
        seed,
        PartialFile(resume, "key"),
        progress,
    )


@functools.cache
def trained_pair() -> tuple[EmpiricalRisk, list[nn.Module]]:
    """Two networks that learnt an exclusive or of signs from different starts."""
    x = normal(60, 4)
    y = (x[:, :2] > 0).sum(1) % 2
    models = []
    for seed in (0, 1):
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 2)).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        models.append(model)
    return EmpiricalRisk(models[0], nn.CrossEntropyLoss(), list(zip(x.split(20), y.split(20), strict=True))), models
