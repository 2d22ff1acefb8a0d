"""The raw numbers behind the optimizer study's tables: all finished runs as one text file, a line each, and back.

A line names the run's file in the cache, so that a study goes on from it on another machine, and runs of other
versions are never mistaken for its own.
"""

import json
from pathlib import Path
from typing import Any

from losslab.studies.record import write_json

DIGITS = 7  # more than the tables have by far
NOT_KEPT = ("seconds", "model_ms", "optimizer_ms", "steps")  # times of runs that shared the machine


def pack(cache: Path, tasks: list[str], file: Path) -> None:
    """Write what the cache holds of some tasks."""
    paths = [path for task in tasks for path in sorted((cache / task).glob("*.json"))]
    lines = [{"file": f"{path.parent.name}/{path.name}", **_shortened(json.loads(path.read_text()))} for path in paths]
    file.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines), encoding="utf-8")


def unpack(file: Path, cache: Path) -> int:
    """Write the runs that the cache does not have into it; how many they were."""
    count = 0
    for line in file.read_text(encoding="utf-8").splitlines():
        found = json.loads(line)
        path = cache / found.pop("file")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, found)
            count += 1
    return count


def _shortened(found: Any) -> Any:
    if isinstance(found, dict):
        return {key: _shortened(value) for key, value in found.items() if key not in NOT_KEPT}
    if isinstance(found, list):
        return [_shortened(value) for value in found]
    return float(f"{found:.{DIGITS}g}") if isinstance(found, float) else found
