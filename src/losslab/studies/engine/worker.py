"""One run of many, in whatever process it is."""

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from losslab.memory import keep_freed_memory
from losslab.status import StopRequested
from losslab.studies.config import make_config
from losslab.studies.engine.jobs import FAILED, INTERRUPTED, LOG, STARTED
from losslab.studies.lock import locked
from losslab.studies.record import RunFolder
from losslab.studies.train import train

PATIENCE = 100.0  # seconds: a file server frees the lock of a machine that died after 90 (NFS 4)


def local_work(values: Mapping[str, Any], folder: Path, parent: int) -> int:
    """A local worker: `work` until told to stop by a signal, or by the end of the process that this one belongs to.

    Returns:
        The process's exit code.
    """
    told: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: told.append(number))
    keep_freed_memory()
    # The process that this one was forked from has read the variable's former value.
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        finished = work(values, folder, lambda: bool(told) or os.getppid() != parent)
    except Exception as error:
        traceback.print_exc()
        # The log's last line is what the engine reports.
        print(" ".join(str(error).split()) or type(error).__name__, file=sys.stderr)  # noqa: T201
        return FAILED
    return 0 if finished else INTERRUPTED


def work(values: Mapping[str, Any], path: Path, stop: Callable[[], bool] = lambda: False) -> bool:
    """Train the run in a folder to its end, or until told to stop; from its checkpoint, where there is one.

    Args:
        values: The run's configuration.
        path: Its folder. A former attempt that is still at work there is waited for.
        stop: Asked after each step.

    Returns:
        Whether it is finished.
    """

    def tick(done: float, total: float, note: str) -> None:
        if stop():
            raise StopRequested

    with locked(path, wait=PATIENCE):
        with (path / LOG).open("a", encoding="utf-8") as log:
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            log.write(f"{STARTED} {now} on {socket.gethostname()}, process {os.getpid()}\n")
        folder = train(make_config(values), RunFolder(path), progress=tick, resume=True)
    return folder.final is not None
