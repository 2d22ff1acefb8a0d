"""One run of many, in whatever process it is."""

import os
import socket
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from losslab.status import StopRequested
from losslab.studies.config import make_config
from losslab.studies.engine.jobs import LOG, STARTED
from losslab.studies.lock import locked
from losslab.studies.record import RunFolder
from losslab.studies.train import train

PATIENCE = 100.0  # seconds: a file server frees the lock of a machine that died after 90 (NFS 4)


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
