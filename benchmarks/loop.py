"""What does losslab's training loop cost over a bare PyTorch loop?

    python benchmarks/loop.py --output benchmarks/results/loop.md

The same network, data, optimizer and number of steps, in turns, several rounds; evaluation and checkpoints, which the
bare loop has not, are left out of both (one epoch, timed by the loop's own clock and around the bare one).
"""

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from table import machine, markdown, publish
from torch.nn.functional import cross_entropy

from losslab.studies.config import make_config
from losslab.studies.data import load_dataset
from losslab.studies.models import build_model
from losslab.studies.record import RunFolder
from losslab.studies.train import train

PROBLEMS: dict[str, dict[str, Any]] = {
    "mlp, digits": {"model": {"name": "mlp", "width": 256}, "dataset": {"batch_size": 64}},
    "simple_cnn, digits": {"model": {"name": "simple_cnn", "width": 32}, "dataset": {"batch_size": 64}},
    "simple_cnn, 32×32": {
        "model": {"name": "simple_cnn", "width": 64},
        "dataset": {"name": "synthetic", "batch_size": 128},
    },
}


def bare(config: Any) -> float:
    """Seconds of one epoch as anybody writes it, with the loss read in each step, as most loops do."""
    data = load_dataset(config.dataset)
    torch.manual_seed(0)
    model = build_model(config.model, data.input_shape, data.num_classes).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.lr)
    inputs, targets = data.train.inputs, data.train.targets
    model.train()
    began = time.perf_counter()
    total, correct = 0.0, 0
    for chosen in torch.randperm(len(targets)).split(config.dataset.batch_size):
        x, y = inputs[chosen], targets[chosen]
        optimizer.zero_grad()
        logits = model(x)
        loss = cross_entropy(logits, y)
        loss.backward()
        optimizer.step()
        total += loss.item() * len(y)
        correct += int((logits.argmax(1) == y).sum())
    return time.perf_counter() - began


def ours(config: Any) -> float:
    """Seconds of the same epoch of losslab's: from the first step to the last, by its own rows' clock."""
    with tempfile.TemporaryDirectory() as folder:
        run = train(config, RunFolder(folder), resume=True)
        return run.metrics()[0]["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="file to write the table to, as well")
    args = parser.parse_args()
    rows = []
    for name, problem in PROBLEMS.items():
        optimizer = {"name": "adamw", "lr": 0.001}
        config = make_config({**problem, "optimizer": optimizer, "training": {"epochs": 1, "device": "cpu"}})
        bare(config), ours(config)
        pairs = np.array([(bare(config), ours(config)) for _ in range(args.rounds)])
        ratios = pairs[:, 1] / pairs[:, 0]
        low, high = np.percentile(ratios, [25, 75])
        times = [f"{1e3 * median:.1f}" for median in np.median(pairs, axis=0)]
        steps = math.ceil(len(load_dataset(config.dataset).train) / config.dataset.batch_size)
        added = 1e3 * np.median(pairs[:, 1] - pairs[:, 0]) / steps
        rows.append([name, str(steps), *times, f"{added:.2f}", f"{np.median(ratios):.3f}", f"{low:.3f}–{high:.3f}"])
        print(rows[-1], flush=True)
    lines = ["# The training loop against a bare one", "", *machine(("losslab", "torch"))]
    lines += [f"- one epoch of AdamW in turns, {args.rounds} rounds: medians, and the ratio's quartiles", ""]
    head = ["problem", "steps", "bare ms", "losslab ms", "added ms a step", "ratio", "quartiles"]
    publish([*lines, *markdown(head, rows)], args.output)


if __name__ == "__main__":
    main()
