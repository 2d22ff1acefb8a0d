"""More processes on this machine that work on the same study, for as long as the first one does."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from typing import Any

import torch

from losslab.status import StopRequested

PATIENCE = 60.0  # seconds that a helper has for its checkpoint before it is ended; what it was at is free then


@contextmanager
def helpers(count: int, work: Callable[..., Any], *arguments: Any) -> Iterator[None]:
    """Run `work(*arguments, progress)` in `count` other processes while the block runs; they share the cores with it.

    They stop after the step in work, with a checkpoint, when the block ends or when this process dies. One that dies
    itself is not replaced: what it was at is taken over.

    Args:
        count: How many.
        work: A function of a module. It stops where `progress` tells it to.
        arguments: Of `work`, picklable.
    """
    if not count:
        yield
        return
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    stop, before = context.Event(), torch.get_num_threads()
    threads = max((os.cpu_count() or 1) // (count + 1), 1)
    others = [context.Process(target=_help, args=(stop, threads, work, arguments), daemon=True) for _ in range(count)]
    for process in others:
        process.start()
    torch.set_num_threads(min(threads, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)
        stop.set()
        for process in others:
            process.join(PATIENCE)
            process.kill()


def _help(stop: Event, threads: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; the first process passes it on
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()

    def progress(done: float, total: float, note: str) -> None:
        if stop.is_set() or (parent is not None and not parent.is_alive()):
            raise StopRequested

    work(*arguments, progress)
