"""The network, the data, and what is known about them: what the processes of peers.py and of report.py share."""

import argparse
import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from data import CACHE, Batches, images, in_batches, name_of, trained_cnn
from torch import Tensor, nn

from losslab import EmpiricalRisk


@dataclass(frozen=True)
class Problem:
    """What each method gets; `known`: float64 values, and what packages have to be told."""

    model: nn.Module
    loss_fn: nn.Module
    batches: Batches
    known: dict[str, Any]

    def double(self) -> "Problem":
        batches = [(x.double(), y) for x, y in self.batches]
        return replace(self, model=copy.deepcopy(self.model).double(), batches=batches)

    def risk(self, **options: Any) -> EmpiricalRisk:
        return EmpiricalRisk(self.model, self.loss_fn, self.batches, **options)

    def facts(self) -> dict[str, Any]:
        """What the heading of a table says about it."""
        risk = self.risk(check=False)
        return {"loss": risk.loss(), "num_parameters": risk.space.size}


def load(args: argparse.Namespace, kind: str = "") -> tuple[Problem, Path]:
    """The problem, and the file of what one kind of benchmark knows about it."""
    settings = {"width": args.width, "examples": args.train_examples, "epochs": args.epochs}
    model, key = trained_cnn(args.data, **settings, cache=args.cache)
    file = args.cache / f"{name_of(key + kind, args.examples, args.batch_size)}.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    batches = in_batches(*images(args.data, args.examples), args.batch_size)
    return Problem(model, nn.CrossEntropyLoss(), batches, known), file


def gradient(problem: Problem) -> list[Tensor]:
    """One gradient over the data, in a plain loop over the batches: the unit g."""
    parameters, examples = list(problem.model.parameters()), sum(len(y) for _, y in problem.batches)
    total = [torch.zeros_like(p) for p in parameters]
    for x, y in problem.batches:
        loss = problem.loss_fn(problem.model(x), y) * (len(y) / examples)
        for whole, part in zip(total, torch.autograd.grad(loss, parameters), strict=True):
            whole.add_(part)
    return total


def parser(description: str | None, methods: Sequence[str], default: Sequence[str], runs: Sequence[str]) -> Any:
    """The command line of a script that measures `methods` in processes of their own, after other `runs`."""
    style = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(description=description, formatter_class=style)
    add = made.add_argument
    add("--data", type=Path, help="folder with cifar10.npz; without it synthetic images")
    add("--examples", type=int, default=500)
    add("--batch-size", type=int, default=125, help="the last batch may be smaller")
    add("--width", type=int, default=64, help="of the network; 64 gives 183,754 parameters")
    add("--train-examples", type=int, default=5000)
    add("--epochs", type=int, default=10)
    add("--repeats", type=int, default=3, help="rounds; a round's number is the random seed")
    add("--methods", nargs="+", choices=methods, default=default, metavar="NAME", help=", ".join(methods))
    add("--threads", type=int, default=torch.get_num_threads())
    add("--timeout", type=float, default=7200, help="seconds that one measurement may take")
    add("--cache", type=Path, default=CACHE, help="folder for trained weights and float64 values")
    add("--output", type=Path, help="file to write the tables to, as well")
    add("--run", choices=[*runs, *methods], help=argparse.SUPPRESS)
    add("--seed", type=int, default=0, help=argparse.SUPPRESS)
    return made


def problem_lines(args: argparse.Namespace, facts: dict[str, Any]) -> list[str]:
    """Data, network and procedure, as the lines of a list."""
    source = "CIFAR-10" if args.data else "synthetic CIFAR-10-shaped"
    return [
        f"- data: {args.examples} {source} images in batches of {args.batch_size}",
        f"- network: SimpleCNN, {facts['num_parameters']:,} parameters, after {args.epochs} epochs on"
        f" {args.train_examples} images; loss on the data {facts['loss']:.3f}",
        f"- {args.repeats} rounds, a fresh process for each measurement: median (smallest–largest)",
        "- g: one gradient on the same data in the same process",
    ]
