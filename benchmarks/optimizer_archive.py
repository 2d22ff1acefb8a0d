"""The raw numbers behind the optimizer study's tables: all finished runs in one file of JSON lines, and back.

    pandas.read_json("benchmarks/results/optimizers_runs.jsonl.xz", lines=True)

A line names the run's file in the cache, so that a study goes on from it on another machine, and runs of other
versions are never mistaken for its own.
"""

import json
import lzma
from pathlib import Path
from typing import Any

from losslab.studies.record import write_json

DIGITS = 7  # more than the tables have by far
NOT_KEPT = ("seconds", "model_ms", "optimizer_ms", "steps")  # times of runs that shared the machine


def pack(cache: Path, tasks: list[str], file: Path) -> None:
    """Write what the cache holds of some tasks."""
    paths = [path for task in tasks for path in sorted((cache / task).glob("*.json"))]
    lines = [{"file": f"{path.parent.name}/{path.name}", **_shortened(json.loads(path.read_text()))} for path in paths]
    with lzma.open(file, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)


def unpack(file: Path, cache: Path) -> int:
    """Write the runs that the cache does not have into it; how many they were."""
    with lzma.open(file, "rt", encoding="utf-8") as lines:
        runs = {cache / run.pop("file"): run for run in map(json.loads, lines)}
    missing = {path: run for path, run in runs.items() if not path.exists()}
    for path, run in missing.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, run)
    return len(missing)


def _shortened(found: Any) -> Any:
    if isinstance(found, dict):
        return {key: _shortened(value) for key, value in found.items() if key not in NOT_KEPT}
    if isinstance(found, list):
        return [_shortened(value) for value in found]
    return float(f"{found:.{DIGITS}g}") if isinstance(found, float) else found
