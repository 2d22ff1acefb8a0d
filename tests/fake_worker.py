"""A stand-in for the engine's local worker that does nothing; the run's name says what happens to it."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from losslab.studies.engine import following, local


def fake(values: dict, folder: Path, parent: int) -> int:
    """Leave what a run leaves, and what the worker was given."""
    kind, stopping = values["name"].split("-")[0], []
    signal.signal(signal.SIGINT, lambda number, frame: stopping.append(number))
    before = (folder / "config.json").exists()
    with (folder / "times.txt").open("a") as file:
        file.write(f"{time.time()} ")
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    seen = [os.environ["OMP_NUM_THREADS"], cpus, os.environ.get("CUDA_VISIBLE_DEVICES"), os.getpid()]
    (folder / "seen.json").write_text(json.dumps(seen))
    (folder / "config.json").write_text(json.dumps(values))
    _log(folder, {"step": 1, "kind": "epoch", "epoch": 1, "train_loss": 0.5, "validation_accuracy": 0.5,
                  "learning_rate": 0.1})  # fmt: skip
    if kind == "mortal" or (kind == "clumsy" and not before):
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "broken":
        print("a long story", flush=True)  # noqa: T201
        print("model.width: no such network", file=sys.stderr)  # noqa: T201
        return 1
    while kind == "endless" and not stopping and not (folder / "release").exists() and os.getppid() == parent:
        time.sleep(0.01)
    if stopping:
        return 130
    time.sleep(0.3)
    with (folder / "times.txt").open("a") as file:
        file.write(f"{time.time()}\n")
    _log(folder, {"step": 2, "kind": "final", "status": "completed", "test_accuracy": 0.75})
    return 0


def _log(folder: Path, row: dict) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def use_fake_workers(monkeypatch: Any) -> None:
    """Let the engine start them, and look at them all the time."""
    monkeypatch.setattr(local, "WORK", fake)
    monkeypatch.setattr(local, "POLL", 0.01)
    monkeypatch.setattr(following, "PERIOD", 0.0)
