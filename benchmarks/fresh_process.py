"""One measurement, one fresh process: nothing an earlier one allocated or cached helps or hurts it."""

import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil


def in_a_fresh_process(script: str, arguments: Sequence[str], timeout: float, launcher: Sequence[str] = ()) -> dict:
    """The JSON object that the script prints as its last line, or {"failure": why there is none}."""
    command = [sys.executable, *launcher, script, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"failure": f"no answer within {timeout:.0f} s"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if done.returncode < 0:
        return {"failure": f"ended by signal {-done.returncode}"}
    complaint = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    if complaint.startswith("ModuleNotFoundError"):
        complaint = f"not installed (pip install 'losslab[bench]'): {complaint.partition(': ')[2]}"
    return {"failure": complaint}


def in_rounds(
    fresh: Callable[[str, int], dict[str, Any]], names: Sequence[str], count: int
) -> list[dict[str, dict[str, Any]]]:
    """name -> result of `fresh(name, round)` for each round; every other round goes through the names backwards."""
    rounds = []
    for number in range(count):
        found = {name: fresh(name, number) for name in (names[::-1] if number % 2 else names)}
        rounds.append({name: found[name] for name in names})
    return rounds


def seconds_of(function: Callable[..., object], *arguments: Any) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


def counted(call: str, vectors: Callable[..., int]) -> list[int]:
    """Count what the calls of "module:Class.method" multiply from now on; `vectors(*arguments)`: how many in a call.

    Imports the module, so that no timing does.
    """
    module, _, path = call.partition(":")
    owner, _, name = path.partition(".")
    cls, count = getattr(importlib.import_module(module), owner), [0]
    original = getattr(cls, name)

    def counting(self: Any, *arguments: Any) -> Any:
        count[0] += vectors(*arguments)
        return original(self, *arguments)

    setattr(cls, name, counting)
    return count


def peak_bytes() -> int:
    """The most memory that this process has held resident."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux's ru_maxrss would count the parent at the time of the fork
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def limit_memory(share: float = 0.85) -> None:
    """Let this process fail, with a message, where it would otherwise take all of the machine's memory."""
    if sys.platform.startswith("linux"):
        import resource

        most = int(share * psutil.virtual_memory().total)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
