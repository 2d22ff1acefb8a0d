"""One process at a time works in a folder, on all machines that see it."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from losslab.studies.record import HOLDER, LOCK


@contextmanager
def locked(folder: Path, *, wait: float = 0.0) -> Iterator[None]:
    """Hold a folder, which is made where there is none, until the block ends or the process dies.

    The operating system keeps the lock, and frees it when its holder dies, however it dies. `.lock.json` says who holds
    it: host, process, since when.

    Args:
        folder: What is held.
        wait: Seconds to wait for another holder.

    Raises:
        BlockingIOError: Another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    holder = folder / HOLDER
    try:
        with FileLock(folder / LOCK, timeout=wait):
            since = datetime.now(timezone.utc).isoformat(timespec="seconds")
            holder.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}) + "\n")
            try:
                yield
            finally:
                holder.unlink(missing_ok=True)
                if not any(child.name != LOCK for child in folder.iterdir()):  # nothing came of it
                    (folder / LOCK).unlink()
    except Timeout:
        raise BlockingIOError(f"{folder}: {_described(holder)} works here; wait for it, or end it") from None


def _described(holder: Path) -> str:
    try:
        who = json.loads(holder.read_text())
        return f"process {who['pid']} on {who['host']}, since {who['since']},"
    except (OSError, ValueError, KeyError):  # it has just come or gone
        return "another process"
