"""How much memory is free, and an allocator that keeps what it is given back."""

import ctypes
import sys
from pathlib import Path

import psutil
import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_ONE_GIB = 1 << 30


def free_bytes(device: torch.device) -> int:
    """Bytes that a new tensor on this device may take.

    The system's available memory, or the GPU's free memory together with what torch's caching allocator holds unused.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has held: on the GPU as torch allocated it, else resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # Linux's ru_maxrss would count the parent at the time of the fork
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return psutil.Process().memory_info().rss  # of now: elsewhere the peak is not to be had in one way


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the host."""
    host = "DefaultCPUAllocator" in str(error) or "can't allocate memory" in str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or host


def keep_freed_memory() -> bool:
    """Make glibc keep large freed blocks for this process instead of returning them to the system each time.

    Every product allocates and frees the same large tensors; by default glibc maps and unmaps them anew, and the
    page faults cost about a sixth of the time (a solver run took 0.83 of it: benchmarks/results/peers_checks.md). The
    price: the process keeps up to its peak memory until it ends. A choice for a program, not for a library, hence this
    explicit call. Returns whether it took effect (only on Linux with glibc).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # musl has neither
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _ONE_GIB)) and bool(mallopt(_M_TRIM_THRESHOLD, _ONE_GIB))
