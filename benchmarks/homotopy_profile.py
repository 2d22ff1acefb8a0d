"""Where does an estimate of the curvature spend its time, and what is the least that it could take?

    python benchmarks/homotopy_profile.py --data FOLDER --output benchmarks/results/homotopy_profile.md

In the midst of the trainings of homotopy.py, one part after each training step, so that caches are as cold as they are
there. "The least": the gradients of the same examples at two points, whose difference is a product; any estimate that
reads curvature off gradients of a batch needs both.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from homotopy_methods import EXAMPLES, settings_of
from homotopy_runs import Run, Training
from homotopy_tasks import SETTINGS, TASKS
from table import machine, markdown, publish
from torch import Tensor

from losslab.optim import CurvatureEstimator
from losslab.optim.homotopy.batch_hessian import BatchHessian
from losslab.optim.homotopy.options import HomotopyOptions
from losslab.optim.homotopy.preconditioner import inverse_root

RATE = 1e-6  # small, so that all contenders stay at like weights
LONG = 10**6  # steps: the end of the run is far away
BEFORE, BURST = 1100, 12  # steps before anything is timed, so that estimates are far apart; and of one contender


def timed(call: Callable[[], object]) -> float:
    """Milliseconds of this thread's processor time."""
    began = time.thread_time()
    call()
    return 1e3 * (time.thread_time() - began)


class Parts:
    """The parts of an estimate on a training's present batch."""

    def __init__(self, training: Training) -> None:
        self.training, self.estimator = training, CurvatureEstimator()
        self.parameters = list(training.model.parameters())
        self.estimate()  # the first call takes ten products

    def loss(self) -> Tensor:
        """Of the examples that estimates use."""
        return self.training.loss_of(EXAMPLES)

    def gradient(self) -> object:
        """As training takes it."""
        return torch.autograd.grad(self.loss(), self.parameters)

    def graph(self) -> BatchHessian:
        """The gradient with its graph, and P^(−½)."""
        return BatchHessian(self.loss, self.parameters, root=inverse_root(self.training.optimizer, self.parameters))

    def estimate(self) -> object:
        """All of it, as `HomotopyLR` has it."""
        root = inverse_root(self.training.optimizer, self.parameters)
        return self.estimator(self.loss, self.parameters, root=root)


def idle(constant: Training, ours: Training, rounds: int) -> list[float]:
    """What steps without an estimate take longer than those of a constant rate, burst by burst."""
    found = []
    for number in range(rounds):
        means = {}
        for training in (constant, ours) if number % 2 else (ours, constant):
            taken = [(timed(training.step), training.due[-1]) for _ in range(BURST)]
            means[training] = statistics.fmean(
                ms for ms, due in taken[1:] if not due
            )  # the first comes with cold caches
        found.append(means[ours] - means[constant])
    return found


def profile(task: str, optimizer: str, data: Path, rounds: int) -> dict[str, float]:
    """Median milliseconds of a step, of what an idle call adds, and of each part of an estimate."""
    here, cpu = TASKS[task].data(data), torch.device("cpu")
    constant, ours = (
        Training(Run(task, optimizer, {"lr": RATE, **settings_of(name, optimizer)}, 0, LONG), here, cpu)
        for name in ("constant", "stable")
    )
    for training in (constant, ours):
        for _ in range(BEFORE):
            training.step()
    parts, found = Parts(constant), {"idle": idle(constant, ours, rounds)}
    for _ in range(rounds):
        constant.step()
        found.setdefault("step", []).append(timed(constant.step))
        for name in ("gradient", "graph", "estimate"):
            constant.step()
            found.setdefault(name, []).append(timed(getattr(parts, name)))
        constant.step()
        hessian, vector = parts.graph(), torch.ones(sum(p.numel() for p in parts.parameters))
        found.setdefault("product", []).append(timed(lambda h=hessian, v=vector: h @ v))
        del hessian
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10.npz, mnist.npz and SST-2")
    tasks = list(dict.fromkeys(setting.task for setting in SETTINGS if setting.task != "quadratic"))
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=tasks)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--output", type=Path, help="file to write the page to, as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, every = [], HomotopyOptions().frequency
    for setting in (s for s in SETTINGS if s.task in args.tasks):
        ms = profile(setting.task, setting.optimizer, args.data, args.rounds)
        step = ms["step"]
        left = ms["estimate"] - ms["graph"] - ms["product"]
        share, least = (ms["idle"] / step + cost / every / step for cost in (ms["estimate"], 2 * ms["gradient"]))
        rows.append([
            setting.title, f"{step:.2f}", f"{1e3 * ms['idle']:.0f}", f"{ms['gradient']:.2f}", f"{ms['graph']:.2f}",
            f"{ms['product']:.2f}", f"{left:.2f}", f"{ms['estimate'] / step:.2f}",
            f"{2 * ms['gradient'] / step:.2f}", f"{share:.1%}", f"{least:.1%}",
        ])  # fmt: skip
    head = ["", "step ms", "idle call µs", "gradient ms", "its graph", "product", "the rest", "estimate, steps",
            "the least, steps", f"overhead every {every} steps", "with the least"]  # fmt: skip
    lines = ["# Where an estimate of the curvature spends its time", "", *machine(("losslab", "torch"))]
    lines += [
        f"- {EXAMPLES} examples an estimate; processor's time, medians of {args.rounds} rounds, one part after each",
        "  training step",
        "- idle call: what a step without an estimate takes longer with HomotopyLR than with torch's LambdaLR",
        "- graph: loss and gradient with its graph, P^(−½), and the checks for operations without second derivatives;",
        "  rest: norms, the vector's update, and what is slower because these follow each other",
        "- the least: two gradients, as training takes them",
        "",
    ]
    publish([*lines, *markdown(head, rows)], args.output)


if __name__ == "__main__":
    main()
