"""Does `losslab.optim.phase` know where a training stands?  Against the Hessian's whole spectrum, on small networks.

    python benchmarks/talt_phase.py --output benchmarks/results/talt_phase.md

Truth, from the whole data: "descending" where the gradient is above a tenth of the longest so far; otherwise "saddle"
where the Hessian's smallest eigenvalue is below -δ times its largest, "near_minimum" where it is not.
"""

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from table import machine, markdown, publish
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from losslab import EmpiricalRisk, Hessian
from losslab.optim.diagnostics import PHASES, phase
from losslab.optim.probe import valley_curvature
from losslab.optim.talt import TALT

DELTA = 0.01  # of the largest eigenvalue
SMALL = 0.1  # of the longest gradient


@dataclass(frozen=True)
class Problem:
    """A network, its data, its loss, and how it is trained."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    lr: float
    sgd_lr: float
    batch: int


class Autoencoder(nn.Module):
    """Six numbers through two, with an offset in the last matrix; weights from near zero."""

    def __init__(self, draw: torch.Generator, squash: Callable[[Tensor], Tensor]):
        super().__init__()
        self.first = nn.Parameter(0.01 * torch.randn(2, 6, generator=draw))
        self.last = nn.Parameter(0.01 * torch.randn(6, 3, generator=draw))
        self.squash = squash

    def forward(self, x: Tensor) -> Tensor:
        """What is left of x."""
        hidden = self.squash(x @ self.first.T)
        return torch.cat([hidden, torch.ones_like(hidden[:, :1])], 1) @ self.last.T


def autoencoder(draw: torch.Generator, batch: int, squash: Callable[[Tensor], Tensor] = lambda h: h) -> Problem:
    """First the mean is learned, which leaves a saddle; then one direction of the data, and the other."""
    x = torch.randn(64, 6, generator=draw) * torch.tensor([2.0, 1.0, 0.3, 0.3, 0.1, 0.1])
    return Problem(Autoencoder(draw, squash), x, x + 5.0, mse_loss, 0.02, 0.1, batch)


def parity(draw: torch.Generator, batch: int) -> Problem:
    """The product of two signs by six tanh units: a plateau, then one slope or two."""
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1))
    for p in model.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=draw)
    x = torch.randn(64, 3, generator=draw).sign() + 0.1 * torch.randn(64, 3, generator=draw)
    return Problem(model, x, (x[:, :1] * x[:, 1:2]).sign(), mse_loss, 0.01, 0.2, batch)


def classes(draw: torch.Generator, batch: int) -> Problem:
    """Three overlapping clouds in four dimensions by eight tanh units, with some wrong labels."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    for p in model.parameters():
        p.data = 0.5 * torch.randn(p.shape, generator=draw)
    y = torch.randint(0, 3, (64,), generator=draw)
    x = torch.randn(64, 4, generator=draw) + 1.5 * torch.randn(3, 4, generator=draw)[y]
    wrong = torch.rand(64, generator=draw) < 0.1
    return Problem(model, x, torch.where(wrong, (y + 1) % 3, y), cross_entropy, 0.01, 0.3, batch)


PROBLEMS = {
    "linear autoencoder": autoencoder,
    "tanh autoencoder": partial(autoencoder, squash=torch.tanh),
    "parity": parity,
    "three classes": classes,
}
WAYS = (
    "statistics",
    "and the step's curvature, batch",
    "and the step's curvature, all data",
    "valley's curvature alone",
)
MOVERS = ("TALT", "SGD")
BATCHES = (16, 64)


def walk(
    problem: Problem, mover: str, steps: int, every: int, draw: torch.Generator
) -> Iterator[tuple[str, dict[str, str]]]:
    """Every so many steps the truth, and what each way says."""
    model, x, y = problem.model, problem.inputs, problem.targets
    talt, sgd = TALT(model.parameters(), problem.lr), torch.optim.SGD(model.parameters(), problem.sgd_lr)
    moving = {"TALT": (talt, problem.lr), "SGD": (sgd, problem.sgd_lr)}
    everything, longest = torch.arange(len(x)), 0.0

    def loss(rows: Tensor) -> Tensor:
        return problem.loss(model(x[rows]), y[rows])

    for step in range(1, steps + 1):
        rows = torch.randperm(len(x), generator=draw)[: problem.batch]
        for name, (optimizer, lr) in moving.items():  # the other one only watches
            optimizer.param_groups[0]["lr"] = lr * (1 - (step - 1) / steps) * (name == mover)
        talt.zero_grad()
        loss(rows).backward()
        talt.step()
        sgd.step()
        if step == 1 or step % every == 0:
            gradient = torch.autograd.grad(loss(everything), list(model.parameters()))
            length = math.sqrt(sum(float(g.square().sum()) for g in gradient))
            longest = max(longest, length)
        if step % every == 0:
            batch, whole = partial(loss, rows), partial(loss, everything)
            known = [phase(talt, loss=probe).overall for probe in (None, batch, whole)]
            valley = "saddle" if valley_curvature(talt, whole) < 0 else "near_minimum"
            known.append(known[0] if known[0] == "descending" else valley)
            yield truth(problem, length / longest), dict(zip(WAYS, known, strict=True))


def truth(problem: Problem, length: float) -> str:
    """The phase, from the gradient's relative length and the Hessian's eigenvalues."""
    if length > SMALL:
        return "descending"
    risk = EmpiricalRisk(problem.model, problem.loss, [(problem.inputs, problem.targets)])
    values = torch.linalg.eigvalsh(Hessian(risk).to_dense())
    return "saddle" if values[0] < -DELTA * values[-1] else "near_minimum"


Counts = Counter[tuple[str, str]]


def counted(mover: str, seeds: range, steps: int, every: int) -> dict[str, Counts]:
    """How often each way said what where the truth was what, and how often each problem was where."""
    found: dict[str, Counts] = {name: Counter() for name in (*WAYS, *PROBLEMS)}
    for name, make in PROBLEMS.items():
        for seed in seeds:
            for batch in BATCHES:
                draw = torch.Generator().manual_seed(seed)
                for true, said in walk(make(draw, batch), mover, steps, every, draw):
                    found[name][true, true] += 1
                    for way, each in said.items():
                        found[way][true, each] += 1
    return found


def table(counts: Counts, way: str) -> Iterator[list[str]]:
    """Precision and recall of each phase, and how often all is right."""
    whole = sum(counts.values())
    for kind in PHASES:
        right = counts[kind, kind]
        said = sum(count for (_, each), count in counts.items() if each == kind)
        true = sum(count for (each, _), count in counts.items() if each == kind)
        yield [way, kind.replace("_", " "), _share(right, said), _share(right, true), f"{said}", f"{true}"]
    yield [way, "all", _share(sum(counts[kind, kind] for kind in PHASES), whole), "", f"{whole}", f"{whole}"]


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2f}" if whole else "—"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs=2, default=(100, 104), help="first, and the one after the last")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--output", type=Path, help="file to write the tables to, as well")
    args = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    lines = ["# TALT's phase against the Hessian's spectrum", "", *machine(("losslab", "torch"))]
    lines += [
        f"- seeds {args.seeds[0]} to {args.seeds[1] - 1}, batches of {' and '.join(map(str, BATCHES))} of 64 examples, "
        f"{args.steps} steps, one look every {args.every}; the thresholds were chosen on seeds 0 and 1",
        f"- truth: descending above {SMALL:g} of the longest gradient; else a saddle where λ_min < −{DELTA:g} λ_max",
        "- who moves the weights: TALT, whose steps are alike in all directions and hardly meet a plateau; or SGD, "
        "while TALT watches with a rate of 0",
    ]
    for mover in MOVERS:
        found = counted(mover, range(*args.seeds), args.steps, args.every)
        shares = [[name, *(f"{found[name][kind, kind]}" for kind in PHASES)] for name in PROBLEMS]
        lines += ["", f"## {mover} moves", "", "How often the truth was what:", ""]
        lines += markdown(["problem", *(kind.replace("_", " ") for kind in PHASES)], shares)
        rows = [row for way in WAYS for row in table(found[way], way)]
        lines += ["", "What was said:", "", *markdown(["from", "phase", "precision", "recall", "said", "true"], rows)]
    publish(lines, args.output)


if __name__ == "__main__":
    main()
