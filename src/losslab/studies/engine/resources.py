"""What each of several runs on one machine may take: CPUs, threads, GPUs, memory."""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TypeVar

import psutil

Item = TypeVar("Item")


def available_cpus() -> list[int]:
    """The CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def available_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch  # noqa: PLC0415 - seconds, for a question that few ask

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    return [str(number) for number in range(torch.cuda.device_count())]


def shares(items: Sequence[Item], parallel: int, size: int) -> list[tuple[Item, ...]]:
    """Deal items out, `size` to each of `parallel`; one after another, and around where there are too few.

    >>> shares([0, 1, 2, 3, 4], parallel=2, size=2)
    [(0, 1), (2, 3)]
    >>> shares([0, 1], parallel=3, size=1)
    [(0,), (1,), (0,)]
    """
    size, count = min(size, len(items)), len(items)
    return [tuple(items[(slot * size + i) % count] for i in range(size)) for slot in range(parallel)]


def environment(cpus: Sequence[int], gpus: Sequence[str]) -> dict[str, str]:
    """This process's environment, with as many threads as CPUs, and only these GPUs, where there are any."""
    threads = str(len(cpus))
    devices = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
    return {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, **devices}


def pin(pid: int, cpus: Sequence[int]) -> None:
    """Keep a process on these CPUs, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        with suppress(ProcessLookupError):  # it is over already
            os.sched_setaffinity(pid, cpus)


class MemoryGate:
    """Is there memory for one more run?

    Each run is expected to need as much as the largest one has taken so far, those that are still growing too.

    Args:
        known: Bytes that a run is known to need.
    """

    def __init__(self, known: int | None = None) -> None:
        self.peak = known or 0
        self._sizes: Mapping[int, int] = {}

    def observe(self, pids: Iterable[int]) -> None:
        """See how much the runs' processes take now."""
        self._sizes = {pid: size for pid in pids if (size := _resident(pid))}
        self.peak = max((self.peak, *self._sizes.values()))

    def admits(self, running: int) -> bool:
        """Whether another one may start beside `running` others. One always may."""
        promised = self.peak * running - sum(self._sizes.values())
        return running == 0 or psutil.virtual_memory().available - promised >= self.peak


def _resident(pid: int) -> int:
    try:
        return psutil.Process(pid).memory_info().rss
    except psutil.Error:  # it has just ended
        return 0
