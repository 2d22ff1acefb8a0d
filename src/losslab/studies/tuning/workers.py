"""Who works on a study, and who has died: a file for each worker, on a folder that several machines may share."""

import json
import os
import platform
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType

import psutil

from losslab.studies.record import write_json

BEAT = 10.0  # seconds between two signs of life
SILENCE = 120.0  # without one a worker elsewhere is dead; network file systems show times up to a minute late


class Worker:
    """One process's part in a study: while it is open, its file `workers/<id>.json` is touched now and then.

    Args:
        study: The study's folder.
    """

    def __init__(self, study: Path):
        self.id = uuid.uuid4().hex[:12]
        self._folder, self._path = study / "workers", study / "workers" / f"{self.id}.json"
        self._seen: dict[str, tuple[float, float]] = {}  # of workers elsewhere: last sign of life, when it was noticed
        self._done = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Worker":
        self._folder.mkdir(parents=True, exist_ok=True)
        process = psutil.Process()
        write_json(self._path, {"machine": _machine(), "pid": process.pid, "started": process.create_time()})
        self._heart.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._done.set()
        self._heart.join()
        self._path.unlink(missing_ok=True)

    def is_dead(self, other: str) -> bool:
        """Whether a worker has ended or was killed, so that its trial is free.

        On this machine the process is asked for. Elsewhere its file must stay untouched for two minutes of this
        machine's clock, whatever the other clock says.
        """
        path = self._folder / f"{other}.json"
        try:
            entry, touched = json.loads(path.read_text(encoding="utf-8")), path.stat().st_mtime
        except (FileNotFoundError, ValueError):
            return True
        if entry["machine"] == _machine():
            return not _is_running(entry["pid"], entry["started"])
        before, noticed = self._seen.get(other, (None, 0.0))
        if before != touched:
            self._seen[other] = (touched, time.monotonic())
            return False
        return time.monotonic() - noticed > SILENCE

    def bury(self, other: str) -> None:
        """Remove a dead worker's file."""
        (self._folder / f"{other}.json").unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._done.wait(BEAT):
            try:
                os.utime(self._path)
            except OSError:  # the folder is out of reach for now, or was removed; the trial itself will tell
                continue


def _machine(namespace: Path = Path("/proc/self/ns/pid")) -> str:
    """Where a process number means the same process: a host, and on Linux the container's numbering."""
    try:
        return f"{platform.node()} {os.readlink(namespace)}"
    except OSError:
        return platform.node()


def _is_running(pid: int, started: float) -> bool:
    """Whether this very process, not another with its number, is at work; a dead one not yet cleared away is not."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - started) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
