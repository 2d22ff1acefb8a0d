"""A step of an elastic band: all pivots on one batch, against one pivot after another.

The baseline is the loop that one would write, as the published implementation does: for each pivot in turn a batch from
the loader, the pivot's weights into the module, one backward pass (at the ends only a forward pass); then each pivot's
tangent and projection. Both sides move the same number of pivots by the same rule (the baseline's is
`band_reference`), from the same start, with the same batch size.
"""

import itertools
import time
from collections.abc import Iterator

import torch
from band_reference import relax_one_by_one
from table import markdown, spread
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from losslab import EmpiricalRisk
from losslab.probes.partial import PartialFile
from losslab.probes.paths.band import Relaxation, straight
from losslab.probes.paths.band_schedule import ElasticBandOptions, schedule_of
from losslab.probes.paths.potential import NetworkPotential
from losslab.studies.models import SimpleCNN

# name -> input shape, layers of an MLP (None: SimpleCNN of width 16), batch size, pivots
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None, int, int]] = {
    "MLP 64-32-10, 7 pivots, batch 64": ((64,), (64, 32, 10), 64, 7),
    "MLP 64-32-10, 31 pivots, batch 64": ((64,), (64, 32, 10), 64, 31),
    "MLP 784-128-10, 9 pivots, batch 64": ((784,), (784, 128, 10), 64, 9),
    "MLP 784-200-200-10, 9 pivots, batch 128": ((784,), (784, 200, 200, 10), 128, 9),
    "CNN 3×16×16, 7 pivots, batch 32": ((3, 16, 16), None, 32, 7),
}
HEADER = ["band", "losslab, ms a step", "one by one, ms a step", "ratio", "ratio, data in memory", "difference"]


def band(rounds: int = 5, steps: int = 5) -> list[str]:
    """The section's lines: a table of one row a case, medians with smallest and largest of `rounds`."""
    rows = [_row(name, rounds, steps) for name in CASES]
    note = (
        "“Data in memory”: neither side reads a loader; what is left is what stacking the pivots brings. Convolutions "
        "are not stacked, and products of large layers take the same time alone and in a stack. “Difference”: of the "
        "pivots' moves on the same batches, relative."
    )
    return [*markdown(HEADER, rows), "", note]


def _row(name: str, rounds: int, steps: int) -> list[str]:
    shape, layers, batch_size, num_nodes = CASES[name]
    model, loader, memory = _problem(shape, layers, batch_size)
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), memory, check=False)
    start = risk.space.vector()
    end = start + 0.05 * torch.randn(start.shape, generator=torch.Generator().manual_seed(1))
    ours: list[float] = []
    fresh: list[float] = []
    held: list[float] = []
    shared: list[float] = []
    # The first round of each warms up.
    for _ in range(rounds + 1):
        _together(risk, loader, start, end, num_nodes, steps, ours)
        _one_by_one(model, _endless(loader), start, end, num_nodes, steps, fresh)
        _together(risk, memory, start, end, num_nodes, steps, held)
        _one_by_one(model, _endless(memory), start, end, num_nodes, steps, shared)
    same = [memory[0]] * 2
    ready = EmpiricalRisk(model, nn.CrossEntropyLoss(), same, check=False)
    together = _together(ready, same, start, end, num_nodes, steps, [])
    alone = _one_by_one(model, _endless(same), start, end, num_nodes, steps, [])
    error = float((together - alone).norm() / (alone - straight(start, end, num_nodes).path).norm())
    pairs = ((ours, fresh), (held, shared))
    ratios, bare = ([b / a for a, b in zip(mine[1:], loop[1:], strict=True)] for mine, loop in pairs)
    milliseconds = [[1e3 * t for t in times[1:]] for times in (ours, fresh)]
    cells = [spread(times, ".3g") for times in milliseconds]
    return [name, *cells, spread(ratios, ".2f"), spread(bare, ".2f"), f"{error:.0e}"]


def _together(risk, data, start: Tensor, end: Tensor, num_nodes: int, steps: int, times: list[float]) -> Tensor:
    risk = risk.held_as(data)
    state, plan = straight(start, end, num_nodes), schedule_of([[steps, 0.01]])
    relaxation = Relaxation(NetworkPotential(risk), state, plan, ElasticBandOptions(), 0, PartialFile(None, ""), None)
    state.cycle = 1
    began = time.perf_counter()
    relaxation._relax(plan.cycles[0])
    times.append((time.perf_counter() - began) / steps)
    return state.path


def _one_by_one(
    model: nn.Module, batches: Iterator, start: Tensor, end: Tensor, num_nodes: int, steps: int, times: list[float]
) -> Tensor:
    own = [p.detach().clone() for p in model.parameters()]
    parameters, loss_fn = list(model.parameters()), nn.CrossEntropyLoss()
    pivot = itertools.cycle(range(num_nodes))

    def evaluate(step: int, point: Tensor) -> tuple[float, Tensor]:
        x, y = next(batches)
        nn.utils.vector_to_parameters(point, parameters)
        if next(pivot) in (0, num_nodes - 1):
            with torch.no_grad():
                return float(loss_fn(model(x), y)), point
        model.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        return float(loss.detach()), torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])

    began = time.perf_counter()
    path = relax_one_by_one(evaluate, list(straight(start, end, num_nodes).path), steps=steps, lr=0.01)
    times.append((time.perf_counter() - began) / steps)
    with torch.no_grad():
        for parameter, value in zip(parameters, own, strict=True):
            parameter.data = value
    return torch.stack(path)


def _endless(batches) -> Iterator:
    while True:
        yield from batches


def _problem(shape, layers, batch_size: int):
    """A network, a loader of random examples as a user has it, and the same batches in memory."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(4 * batch_size, *shape, generator=generator), torch.arange(4 * batch_size) % 10
    torch.manual_seed(0)
    if layers is None:
        model: nn.Module = SimpleCNN(in_channels=shape[0], num_classes=10, width=16)
    else:
        linear = [nn.Linear(a, b) for a, b in itertools.pairwise(layers)]
        model = nn.Sequential(*[m for layer in linear for m in (layer, nn.ReLU())][:-1])
    loader = DataLoader(TensorDataset(x, y), batch_size, shuffle=True, generator=torch.Generator().manual_seed(0))
    return model, loader, list(zip(x.split(batch_size), y.split(batch_size), strict=True))


if __name__ == "__main__":
    print("\n".join(band()))
