"""A local worker: `python -m losslab.studies.engine FOLDER PARENT < config.json` trains one run."""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

from losslab.memory import keep_freed_memory
from losslab.studies.engine.jobs import FAILED, INTERRUPTED
from losslab.studies.engine.worker import work


def main(arguments: list[str]) -> int:
    """Work until told to stop by a signal, or by the end of the process that started this one."""
    path, parent = Path(arguments[0]), int(arguments[1])
    told: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: told.append(number))
    keep_freed_memory()
    try:
        finished = work(json.load(sys.stdin), path, lambda: bool(told) or os.getppid() != parent)
    except Exception as error:
        traceback.print_exc()
        # The log's last line is what the engine reports.
        print(" ".join(str(error).split()) or type(error).__name__, file=sys.stderr)  # noqa: T201
        return FAILED
    return 0 if finished else INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
