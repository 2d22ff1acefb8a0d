"""A stand-in for the engine's local worker that starts in no time."""

import sys
from pathlib import Path

import pytest

from losslab.studies.engine import following, local

# Without torch; the run's name says what happens to it.
FAKE = """
import json, os, signal, sys, time
folder, parent, values = sys.argv[1], int(sys.argv[2]), json.load(sys.stdin)
kind, path = values["name"].split("-")[0], lambda name: os.path.join(folder, name)
stopping = []
signal.signal(signal.SIGINT, lambda number, frame: stopping.append(number))
before = os.path.exists(path("config.json"))
with open(path("times.txt"), "a") as file:
    file.write(f"{time.time()} ")
with open(path("seen.json"), "w") as file:
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    json.dump([os.environ["OMP_NUM_THREADS"], cpus, os.environ.get("CUDA_VISIBLE_DEVICES"), os.getpid()], file)
with open(path("config.json"), "w") as file:
    json.dump(values, file)
def log(row):
    with open(path("metrics.jsonl"), "a") as file:
        file.write(json.dumps(row) + "\\n")
log({"step": 1, "kind": "epoch", "epoch": 1, "train_loss": 0.5, "validation_accuracy": 0.5, "learning_rate": 0.1})
if kind == "mortal" or (kind == "clumsy" and not before):
    os.kill(os.getpid(), signal.SIGKILL)
if kind == "broken":
    print("a long story")
    sys.exit("model.width: no such network")
while kind == "endless" and not stopping and not os.path.exists(path("release")) and os.getppid() == parent:
    time.sleep(0.01)
if stopping:
    sys.exit(130)
time.sleep(0.1)
with open(path("times.txt"), "a") as file:
    file.write(f"{time.time()}\\n")
log({"step": 2, "kind": "final", "status": "completed", "test_accuracy": 0.75})
"""


def use_fake_workers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the engine start them, and look at them all the time."""
    script = folder / "fake.py"
    script.write_text(FAKE)
    monkeypatch.setattr(local, "COMMAND", (sys.executable, "-S", str(script)))
    monkeypatch.setattr(local, "POLL", 0.01)
    monkeypatch.setattr(following, "PERIOD", 0.0)
