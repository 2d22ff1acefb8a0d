"""Fifty kills at random moments: does a run that is resumed each time end with the numbers of one never killed?

    python benchmarks/kills.py --kills 50 --output benchmarks/results/kills.md

A training process is killed (SIGKILL) at random times after its start, again and again, and started anew with
`resume`; the metrics and every tensor of every checkpoint are then compared bit for bit with an undisturbed run's.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from table import machine, publish

from losslab.studies import checkpoint
from losslab.studies.config import make_config
from losslab.studies.record import RunFolder, write_json

TIMES = ("seconds", "samples_per_second", "step_seconds", "peak_memory_bytes")
CONFIG = {
    "name": "killed",
    "dataset": {"batch_size": 32, "augment": ["crop"]},
    "model": {"name": "simple_cnn", "width": 16, "batch_norm": True},
    "optimizer": {"name": "adamw", "lr": 0.003},
    "schedule": {"name": "cosine", "warmup_steps": 20},
    "training": {
        "device": "cpu", "ema": 0.99, "clip_norm": 1.0, "eval_every": 10,
        "checkpoints": {"every": 5, "keep": 100}, "snapshots": {"every": 50},
    },
}  # fmt: skip


def start(config: Path, folder: Path) -> subprocess.Popen:
    command = ["-m", "losslab", "train", str(config), "--output", str(folder), "--resume", "--quiet"]
    return subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)


def outcome(folder: RunFolder) -> tuple[list[dict], dict[str, bytes]]:
    """The metrics without times, and every tensor's bytes."""
    rows = [{key: value for key, value in row.items() if key not in TIMES} for row in folder.metrics()]
    found = {name: checkpoint.load(folder, name).weights for name in checkpoint.names(folder)}
    found |= {f"snapshot {s.step}": s.weights for s in checkpoint.snapshots(folder)}
    return rows, {f"{n}/{key}": t.numpy().tobytes() for n, tensors in found.items() for key, t in tensors.items()}


def kill_again_and_again(config: Path, folder: Path, kills: int, rng: random.Random) -> list[int | None]:
    """Kill so many times; at which step the last checkpoint then was."""
    steps: list[int | None] = []
    run = RunFolder(folder)
    while len(steps) < kills:
        process = start(config, folder)
        while not (folder / "checkpoints").exists() and process.poll() is None:
            time.sleep(0.01)
        began = run.metrics()[-1]["step"] if run.metrics() else 0
        while process.poll() is None and (run.metrics() or [{"step": 0}])[-1]["step"] == began:
            time.sleep(0.005)  # the import of torch is no moment of a training
        time.sleep(rng.uniform(0, 0.5))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
        if run.final is not None:
            raise RuntimeError(f"finished after {len(steps)} kills: give it more epochs")
        steps.append(checkpoint.load(run, "last").step if "last" in checkpoint.names(run) else None)
        print(f"kill {len(steps)}: the checkpoint is of step {steps[-1]}", flush=True)
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=60, help="34 steps each")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, help="file to write the table to, as well")
    args = parser.parse_args()
    training = {**CONFIG["training"], "epochs": args.epochs}
    with tempfile.TemporaryDirectory() as temporary:
        config = Path(temporary) / "config.json"
        write_json(config, make_config({**CONFIG, "training": training}).model_dump(mode="json"))
        whole, killed = Path(temporary) / "whole", Path(temporary) / "killed"
        start(config, whole).wait()
        steps = kill_again_and_again(config, killed, args.kills, random.Random(args.seed))
        start(config, killed).wait()
        rows, tensors = outcome(RunFolder(whole))
        rows_again, tensors_again = outcome(RunFolder(killed))
    same_rows, same_tensors = rows == rows_again, tensors == tensors_again
    lines = ["# A run killed again and again", "", *machine(("losslab", "torch"))]
    lines += [
        f"- {args.kills} kills (SIGKILL) at random moments; {args.epochs} epochs of 34 steps, a checkpoint each 5",
        f"- steps between the checkpoints found: median {np.median(np.diff([0, *(step or 0 for step in steps)])):.0f}",
        f"- {len(rows)} rows of metrics: {'identical' if same_rows else 'DIFFERENT'}",
        f"- {len(tensors)} tensors of checkpoints and snapshots: {'identical' if same_tensors else 'DIFFERENT'}",
    ]
    lines += [
        f"- at first {one} and then {other}" for one, other in zip(rows, rows_again, strict=False) if one != other
    ][:1]
    unlike = [name for name in sorted({*tensors, *tensors_again}) if tensors.get(name) != tensors_again.get(name)]
    lines += [f"- unlike: {', '.join(unlike[:5])}"] if unlike else []
    publish(lines, args.output)
    sys.exit(0 if same_rows and same_tensors else 1)


if __name__ == "__main__":
    main()
