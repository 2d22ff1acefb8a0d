"""One measurement, one fresh process: nothing an earlier one allocated or cached helps or hurts it."""

import json
import subprocess
import sys
from pathlib import Path


def in_a_fresh_process(script: str, arguments: list[str], timeout: float) -> dict:
    """The JSON object that the script prints as its last line, or {"failure": why there is none}."""
    command = [sys.executable, script, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"failure": f"no answer within {timeout:.0f} s"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    complaint = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    if complaint.startswith("ModuleNotFoundError"):
        complaint = f"not installed (pip install 'losslab[bench]'): {complaint.partition(': ')[2]}"
    return {"failure": complaint}


def peak_bytes() -> int:
    """The most memory that this process has held resident."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux's ru_maxrss would count the parent at the time of the fork
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
