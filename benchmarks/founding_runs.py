"""Do the shipped configurations reach what the founding studies state?  CIFAR-10 by three optimizers, SST-2 by a BERT.

    python benchmarks/founding_runs.py --data FOLDER --output benchmarks/results/founding_runs.md

FOLDER holds cifar10.npz (x_train, y_train, x_test, y_test) and SST-2/train.tsv, dev.tsv. Each run is `losslab train`
with the configuration's own settings; a run that was killed goes on from its checkpoint in `--cache`.
"""

import argparse
from pathlib import Path

from table import machine, markdown, publish

from losslab.studies.config import load_config
from losslab.studies.record import RunFolder
from losslab.studies.shipped import find_config
from losslab.studies.train import train

# configuration, what is changed in it, what is stated (per cent), of which split
RUNS = (
    ("cifar10_sgd", (), "63.6", "test"),
    ("cifar10_sgd", ("optimizer.lr=0.05",), "63.6", "test"),
    ("cifar10_momentum", (), "71.9", "test"),
    ("cifar10_adamw", (), "71.9", "test"),
    ("bert_sst2", (), "> 75", "validation"),
)


def row(name: str, changes: tuple[str, ...], stated: str, split: str, data: Path, cache: Path) -> list[str]:
    """Train it, or go on with it; its line of the table."""
    place = f"dataset.root={data}" if name == "bert_sst2" else f"dataset.name=arrays:{data / 'cifar10.npz'}"
    config = load_config(find_config(name), [place, *changes])
    run = train(config, RunFolder(cache / "-".join((name, *changes))), resume=True)
    last = [line for line in run.metrics() if line["kind"] == "epoch"][-1]
    test = (run.final or {})["test_accuracy"]
    reached = test if split == "test" else last["validation_accuracy"]
    others = f"{last['validation_accuracy']:.1%}", f"{test:.1%}"
    cells = [", ".join((name, *changes)), f"{last['epoch']:g}", f"{stated} ({split})", f"{reached:.1%}", *others]
    return [*cells, f"{last['seconds'] / 60:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("runs/founding"), help="run folders")
    parser.add_argument("--only", nargs="+", default=[name for name, *_ in RUNS], help="configurations")
    parser.add_argument("--set", action="append", default=[], dest="changes", help="of every run, to see it work")
    parser.add_argument("--output", type=Path, help="file to write the table to, as well")
    args = parser.parse_args()
    rows = []
    for name, changes, stated, split in RUNS:
        if name in args.only:
            rows.append(row(name, (*changes, *args.changes), stated, split, args.data, args.cache))
            print(rows[-1], flush=True)
    lines = ["# What the founding studies state, and what comes out", "", *machine(("losslab", "torch")), ""]
    head = ["run", "epochs", "stated, %", "reached", "validation", "test", "minutes of training"]
    publish([*lines, *markdown(head, rows)], args.output)


if __name__ == "__main__":
    main()
