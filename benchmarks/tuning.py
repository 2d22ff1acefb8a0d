"""What does pruning save, and is the best of thirty trials better than the configuration as it stood?

    python benchmarks/tuning.py --output benchmarks/results/tuning.md

The study of docs/tune.md: AdamW's own space, an MLP of 64 units on the digits for 10 epochs. With each pruner; then the
best values of each and the configuration itself are trained anew with fresh seeds.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from table import machine, markdown, publish

from losslab.studies.config import apply, load_config
from losslab.studies.record import RunFolder
from losslab.studies.sections import RunConfig
from losslab.studies.shipped import find_config
from losslab.studies.spaces import SPACES
from losslab.studies.train import train
from losslab.studies.tune import Tuned, TuneOptions, tune

PRUNERS = ("asha", "hyperband", "none")
METRIC = "validation_loss"


def study(base: RunConfig, pruner: str, trials: int, seed: int) -> Tuned:
    """One, in a folder of its own."""
    options = TuneOptions(space=SPACES["adamw"], trials=trials, metric=METRIC, pruner=pruner, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        return tune(base, Path(folder) / "study", options)


def at_the_end(config: RunConfig, seed: int) -> float:
    """The metric of one training with another seed."""
    with tempfile.TemporaryDirectory() as folder:
        run = train(apply(config, {"seed": seed, "training.evaluate_test": False}), RunFolder(folder), resume=True)
        return [row for row in run.metrics() if row["kind"] == "epoch"][-1][METRIC]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=10, help="34 steps each")
    parser.add_argument("--studies", type=int, default=2, help="of each pruner, with other seeds of the sampler")
    parser.add_argument("--seeds", type=int, default=8, help="fresh ones, after tuning")
    parser.add_argument("--output", type=Path, help="file to write the page to, as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    base = load_config(find_config("adamw"), ["model.name=mlp", f"training.epochs={args.epochs}"])
    seeds = range(1, args.seeds + 1)
    fresh = [at_the_end(base, seed) for seed in seeds]
    rows = [["as it stands", "", "", "", "", f"{statistics.fmean(fresh):.4f} ± {statistics.stdev(fresh):.4f}", ""]]
    for pruner in PRUNERS:
        for number in range(args.studies):
            tuned = study(base, pruner, args.trials, number)
            steps = [trial.steps for trial in tuned.trials]
            pruned = sum(trial.status == "pruned" for trial in tuned.trials)
            values = [at_the_end(tuned.best, seed) for seed in seeds]
            gains = [after - before for after, before in zip(values, fresh, strict=True)]
            rows.append([
                f"{pruner}, study {number}", f"{sum(steps):,}", str(pruned), f"{tuned.best.optimizer.lr:.3g}",
                f"{tuned.value:.4f}", f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}",
                f"{statistics.fmean(gains):+.4f} ± {statistics.stdev(gains) / len(gains) ** 0.5:.4f}",
            ])  # fmt: skip
            print(rows[-1], flush=True)
    lines = ["# Thirty trials, and what they gain", "", *machine(("losslab", "torch", "optuna"))]
    lines += [
        f"- {args.trials} trials of AdamW's space with one seed; an MLP of 64 units, the digits, {args.epochs} epochs",
        f"- {args.seeds} fresh seeds: mean ± standard deviation of the {METRIC.replace('_', ' ')} at the end; gain:",
        "  mean ± standard error of the difference by pairs, negative where tuning helped",
        "",
    ]
    head = ["study", "steps", "pruned", "best lr", "its value", "fresh seeds", "gain"]
    publish([*lines, *markdown(head, rows)], args.output)


if __name__ == "__main__":
    main()
