"""Small studies: a base and a space, a stand-in for training that takes no time, and a process that kills itself."""

import json
import math
import os
import signal
import sys
from pathlib import Path

import torch

from losslab.status import StopRequested
from losslab.studies.config import apply
from losslab.studies.record import RunFolder
from losslab.studies.sections import RunConfig
from losslab.studies.spaces import Range
from losslab.studies.tune import TuneOptions, tune

EPOCHS, PER_EPOCH = 9, 5  # judged after the first and the third epoch
BASE = apply(
    RunConfig(),
    {
        "model.name": "mlp",
        "model.width": 8,
        "model.hidden": 1,
        "dataset.batch_size": 256,
        "training.epochs": EPOCHS,
        "training.device": "cpu",
    },
)
SPACE = {"optimizer.lr": Range(1e-3, 10.0, log=True), "optimizer.momentum": Range(0.0, 0.9)}
TRIALS = 7
KILLED = (2, 2 * PER_EPOCH + 2)  # the trial, and its step


def options(**changes) -> TuneOptions:
    return TuneOptions(**{"space": SPACE, "trials": TRIALS, **changes})


def stand_in(config, run, *, sinks=(), progress=None, resume=False):
    """What `train` promises, on a loss that is known: best at a rate of 1, diverging above 5."""
    assert resume
    assert not config.training.evaluate_test
    checkpoint = run.path / "checkpoints" / "last.json"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    run.write_config(config.model_dump(mode="json"))
    step = json.loads(checkpoint.read_text())["step"] if checkpoint.exists() else 0
    rate, momentum, stopped = config.optimizer.lr, config.optimizer.momentum, False
    while step < EPOCHS * PER_EPOCH and not stopped:
        step += 1
        diverged = rate > 5
        if step % PER_EPOCH == 0 or diverged:
            loss = math.nan if diverged else math.log10(rate) ** 2 + 0.01 * momentum + 1 / step
            row = {"kind": "epoch", "epoch": step / PER_EPOCH, "seconds": float(step), "train_loss": loss}
            row |= {"validation_loss": loss, "validation_accuracy": math.exp(-min(loss, 9.0))}
            for sink in (run, *sinks):
                try:
                    sink.log(step, row)
                except StopRequested:
                    stopped = True
        try:
            if progress is not None:
                progress(step, EPOCHS * PER_EPOCH, "")
        except StopRequested:
            stopped = True
        if stopped or step % PER_EPOCH == 0:
            checkpoint.write_text(json.dumps({"step": step}))
        if diverged and not stopped:
            run.log(step, {"kind": "final", "status": "diverged"})
            return run
    if not stopped:
        run.log(step, {"kind": "final", "status": "completed"})
    return run


def without_times(tuned) -> list[tuple]:
    return [(t.number, t.status, t.value, t.parameters, t.steps, t.share) for t in tuned.trials]


def rows_of(folder: Path) -> list[dict]:
    return [row for path in sorted((folder / "trials").iterdir()) for row in RunFolder(path).metrics()]


def die(done: float, total: float, note: str) -> None:
    """A progress that kills its process in the middle of a trial."""
    trial, step = KILLED
    if note.startswith(f"trial {trial}:") and abs(done - trial - step / (EPOCHS * PER_EPOCH)) < 1e-9:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    tune(BASE, sys.argv[1], options(), progress=die)
