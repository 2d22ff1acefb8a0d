"""Where does TALT's step go, and how much of it is arithmetic that no other code could do without?

    python benchmarks/talt_profile.py --data FOLDER --output benchmarks/results/talt_profile.md

The parts of a step are timed in trainings of as many steps as TALT needs to AdamW's loss in results/optimizers.md.
Their matrix products and decompositions are then done again, bare, on warm matrices of the same shapes: what is left
are operations entry by entry, and calls, of which a step on tensors of a few entries tells the price.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from optimizer_runs import Run, Training
from optimizer_tasks import TASKS
from table import machine, markdown, publish, spread
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from losslab.optim import TALT, talt
from losslab.optim.eigenspace import basis, update

SETTINGS = {"adamw": {"lr": 1e-3}, "talt": {"lr": 3e-3}}
STEPS = {"digits": 35, "cifar10": 39, "autoencoder": 98, "resnet": 80, "characters": 114}
# A part's name, and the functions that are it, by module.
PARTS = {
    "to the bases and back": (update, ("rotated", "rotated_back")),
    "averages and responses": (update, ("averaged", "squared", "responses", "weighed")),
    "singular values": (update, ("equalized",)),
    "covariances": (update, ("observe",)),
    "new bases but for the next": (update, ("refresh",)),
    "their QR, first eigenvectors": (basis, ("orthonormal", "eigenvectors")),
}
INSIDE = {"their QR, first eigenvectors": "new bases but for the next"}  # called by
ARITHMETIC: dict[str, Callable[..., Any]] = {
    "bmm": torch.bmm,
    "baddbmm": torch.baddbmm,
    "baddbmm_": torch.baddbmm,
    "geqrf": torch.geqrf,
    "linalg_householder_product": torch.linalg.householder_product,
    "_linalg_eigh": lambda A: torch.linalg.eigh(A @ A.mT),
}
Shapes = tuple[tuple[int, ...], ...]


class Clock:
    """Milliseconds by part."""

    def __init__(self) -> None:
        self.spent: Counter[str] = Counter()

    @contextmanager
    def on(self) -> Iterator[None]:
        """Time the functions of all parts."""
        places = [(part, module, name) for part, (module, names) in PARTS.items() for name in names]
        kept = [getattr(module, name) for _, module, name in places]
        for (part, module, name), function in zip(places, kept, strict=True):
            setattr(module, name, self._timed(part, function))
        try:
            yield
        finally:
            for (_, module, name), function in zip(places, kept, strict=True):
                setattr(module, name, function)

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            found = function(*args, **kwargs)
            spent = 1e3 * (time.perf_counter() - began)
            self.spent[part] += spent
            if part in INSIDE:
                self.spent[INSIDE[part]] -= spent
            return found

        return timed


class Calls(TorchDispatchMode):
    """How often there is which operation, on which shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, Shapes]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = tuple(tuple(each.shape) for each in args if isinstance(each, Tensor))
        self.found[func.overloadpacket.__name__, shapes] += 1
        return func(*args, **(kwargs or {}))


def trained(run: Run, data: Any) -> float:
    """A training's milliseconds in its optimizer, a step."""
    training = Training(run, data)
    for _ in range(run.horizon):
        training.step()
    return 1e3 * training.optimizer_seconds / run.horizon


def parts_of(run: Run, data: Any) -> dict[str, float]:
    """Milliseconds a step of each part, and of what is in none."""
    clock = Clock()
    with clock.on():
        whole = trained(run, data)
    found = {part: clock.spent[part] / run.horizon for part in PARTS}
    return {**found, "the rest": whole - sum(found.values()), "whole": whole}


def calls_of(run: Run, data: Any) -> Counter[tuple[str, Shapes]]:
    """The operations of all steps."""
    calls, own = Calls(), talt.update

    def watched(*args: Any) -> Any:
        with calls:
            return own(*args)

    talt.update = watched
    try:
        trained(run, data)
    finally:
        talt.update = own
    return calls.found


def fastest(function: Callable[[], object], times: int = 30) -> float:
    """Milliseconds, the median of some."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        function()
        found.append(1e3 * (time.perf_counter() - began))
    return median(found)


def arithmetic(calls: Counter[tuple[str, Shapes]], steps: int) -> float:
    """Milliseconds a step of products and decompositions alone."""
    total = 0.0
    for (name, shapes), count in calls.items():
        if function := ARITHMETIC.get(name):
            matrices = [torch.randn(shape) for shape in shapes]
            total += count / steps * fastest(lambda function=function, matrices=matrices: function(*matrices))
    return total


def idle(stacks: int) -> float:
    """Milliseconds of a step, between new bases, on so many matrices of a few entries and no two of a shape."""
    parameters = [torch.nn.Parameter(torch.randn(2, 3 + index)) for index in range(stacks)]
    optimizer = TALT(parameters)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return fastest(optimizer.step, 400)


def lines_of(task: str, args: argparse.Namespace) -> list[str]:
    """A task's tables."""
    data, steps = TASKS[task].data(args.data), args.steps or STEPS[task]
    own, rival = (Run(task, name, SETTINGS[name], seed=0, horizon=steps) for name in ("talt", "adamw"))
    trained(own, data)  # what the first step of a process loads and chooses is nobody's
    rounds, whole, theirs = [], [], []
    for _ in range(args.rounds):
        whole.append(trained(own, data))
        theirs.append(trained(rival, data))
        rounds.append(parts_of(own, data))
    calls = calls_of(own, data)
    stacks = _stacks(own, data)
    parts = [[part, spread([found[part] for found in rounds], ".2f")] for part in (*PARTS, "the rest", "whole")]
    floor = [
        ["AdamW's step", spread(theirs, ".2f")],
        ["TALT's step, untimed within", spread(whole, ".2f")],
        ["its products and decompositions alone", f"{arithmetic(calls, steps):.2f}"],
        [f"a step on {stacks} matrices of a few entries, of as many shapes", f"{idle(stacks):.2f}"],
        ["calls of torch in a step", f"{sum(calls.values()) / steps:.0f}"],
    ]
    title = f"## {TASKS[task].title}, {steps} steps"
    return ["", title, "", *markdown(["part", "ms a step"], parts), "", *markdown(["", "ms a step"], floor)]


def _stacks(run: Run, data: Any) -> int:
    """How many stacks of matrices the network's tensors make."""
    training = Training(run, data)
    training.step()
    shapes = [tuple(state["exp_avg"].shape) for state in training.optimizer.state.values() if "refreshes" in state]
    return len(set(shapes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the data files")
    parser.add_argument("--tasks", nargs="+", choices=STEPS, default=["digits", "autoencoder", "cifar10", "characters"])
    parser.add_argument("--steps", type=int, help="of each training; what TALT needs by default")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="file to write the tables to, as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["# Where TALT's step goes", "", *machine(("losslab", "torch"))]
    lines += [f"- one thread; median (smallest–largest) of {args.rounds} rounds; means over a training's steps"]
    for task in args.tasks:
        lines += lines_of(task, args)
    publish(lines, args.output)


if __name__ == "__main__":
    main()
