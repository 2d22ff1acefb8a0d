"""A worker's process, forked from one that has imported losslab already: that takes longer than many a run."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from losslab.studies.engine.jobs import LOG

# What a training needs, and what it imports only as it begins.
PRELOADED = ["losslab.studies.engine.worker", "lightning_fabric", "sklearn.datasets", "sklearn.model_selection"]
# (a run's configuration, its folder, the process whose end is the worker's) -> exit code
Work = Callable[[Mapping[str, Any], Path, int], int]


def start(work: Work, values: Mapping[str, Any], folder: Path, environment: Mapping[str, str]) -> BaseProcess:
    """Let another process do the work, in a session of its own: a terminal's Ctrl-C does not reach it.

    What it prints goes to the folder's log. On Windows, which cannot fork, it starts from nothing.

    Raises:
        OSError: The log cannot be written.
    """
    with (folder / LOG).open("ab"):  # here, where the error can be told
        pass
    can_fork = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if can_fork else "spawn")
    if can_fork:
        context.set_forkserver_preload(PRELOADED)  # of no effect once the server is there
    process = context.Process(target=_run, args=(work, values, folder.resolve(), Path.cwd(), dict(environment)))
    with _without_main():
        process.start()
    return process


def _run(work: Work, values: Mapping[str, Any], folder: Path, here: Path, environment: Mapping[str, str]) -> None:
    """In the new process."""
    if hasattr(os, "setsid"):
        os.setsid()
    with (folder / LOG).open("ab", buffering=0) as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    os.chdir(here)
    os.environ.update(environment)
    sys.exit(work(values, folder, os.getppid()))


@contextmanager
def _without_main() -> Iterator[None]:
    """Keep multiprocessing from running the program's main script again in the new process, which needs nothing of it.

    So that a script, or a notebook, may start a batch without `if __name__ == "__main__"`.
    """
    main = sys.modules["__main__"]
    names = [name for name in ("__file__", "__spec__") if name in main.__dict__]
    hidden: dict[str, Any] = {name: main.__dict__.pop(name) for name in names}
    main.__spec__ = None
    try:
        yield
    finally:
        main.__dict__.update(hidden)
