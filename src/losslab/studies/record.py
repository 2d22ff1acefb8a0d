"""The run folder: what a run leaves on disk, and the only thing that probing and reporting know of training.

    config.json  environment.json  metrics.jsonl  checkpoints/  snapshots/  probes/<probe>/<label>.json + .npz

A study folder holds run folders and, for what was measured between them, a `probes/` of its own. Nothing here
needs torch, so a report can be made where there is none. Every file but the growing `metrics.jsonl` appears
whole or not at all.
"""

import io
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from losslab.records import decode, encode, write_atomically

LOCK, HOLDER = LOCKS = (".lock", ".lock.json")  # what a lock may leave in a folder: see `losslab.studies.lock`
# What `create(overwrite=True)` may delete: what a run leaves behind, and nothing else.
_LEFT_BY_A_RUN = (
    "config.json",
    "environment.json",
    "metrics.jsonl",
    "report.html",
    "talt.html",
    "homotopy.csv",
    "checkpoints",
    "snapshots",
    "probes",
    "figures",
    "tensorboard",
    "worker.log",
)
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Sink(Protocol):
    """Takes rows of numbers while a run goes on: a file, a board, a bar."""

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Take one row, known after `step` optimizer steps."""


@runtime_checkable
class ModelSink(Sink, Protocol):
    """A sink that looks at the network too, at each row; it leaves it as it is."""

    def open(self, network: Any, example: Any, step: int) -> None:
        """Told once, before the training's first step.

        Args:
            network: The module that is trained; the same object until the end.
            example: One batch of its inputs.
            step: The steps that it has taken: what was told of later ones, before the run was killed, is void.
        """

    def close(self) -> None:
        """Told once, after the last row or when the run was stopped."""


class RunFolder:
    """One run's folder. It is itself a `Sink`, whose rows go to `metrics.jsonl`.

    The constructor only names the folder (so that `RunFolder(study).probes()` reads what a study measured
    between its runs); `create` makes a new one, `open` demands that a run is there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @classmethod
    def create(cls, path: str | Path, *, overwrite: bool = False) -> "RunFolder":
        """Make an empty run folder.

        Args:
            path: Where. Missing parents are made.
            overwrite: Whether to delete an earlier run's files there. Files that no run writes are kept.

        Raises:
            FileExistsError: If something is there already and `overwrite` is false.
        """
        folder = cls(path)
        if folder.path.exists() and not folder.path.is_dir():
            raise FileExistsError(f"{path}: a file is there; choose another folder for the run")
        if overwrite:
            for name in _LEFT_BY_A_RUN:
                _remove(folder.path / name)
        elif folder.path.is_dir() and any(child.name not in LOCKS for child in folder.path.iterdir()):
            raise FileExistsError(
                f"{path}: the folder is not empty; choose another one, or pass --overwrite for an earlier run, "
                "--resume to go on with it"
            )
        folder.path.mkdir(parents=True, exist_ok=True)
        return folder

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """The run folder at `path`.

        Raises:
            FileNotFoundError: If there is no run, with the runs below it if it is a study.
        """
        folder = cls(path)
        if folder.is_run():
            return folder
        if not folder.path.is_dir():
            raise FileNotFoundError(f"{path}: no such folder; expected one that `losslab train` wrote")
        inside = ", ".join(_runs_below(folder.path))
        hint = f"it holds the runs {inside}: name one of them" if inside else "no config.json in it"
        raise FileNotFoundError(f"{path}: not a run folder: {hint}")

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    def is_run(self) -> bool:
        """Whether a run was started here."""
        return (self.path / "config.json").is_file()

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration as plain values."""
        return _read_json(self.path / "config.json")

    @property
    def environment(self) -> dict[str, Any]:
        """Versions, hardware, seed: where and with what the run was made."""
        return _read_json(self.path / "environment.json")

    def write_config(self, values: Mapping[str, Any]) -> None:
        """Write the resolved configuration; from here on the folder counts as a run."""
        write_json(self.path / "config.json", values)

    def write_environment(self, values: Mapping[str, Any]) -> None:
        """Write the versions, hardware and seed."""
        write_json(self.path / "environment.json", values)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Append one row to `metrics.jsonl`."""
        row = json.dumps(encode({"step": step, **values}), allow_nan=False)
        path = self.path / "metrics.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(row + "\n")
        except OSError as error:
            if error.errno is not None:
                error.filename = str(path)  # a write to a full disk names none
            raise

    def rewind(self, step: int) -> None:
        """Forget the rows that were logged after `step` steps, and a run's end: training goes on from there."""
        kept = [row for row in self.metrics() if row["step"] <= step and row.get("kind") != "final"]
        text = "".join(json.dumps(encode(row), allow_nan=False) + "\n" for row in kept)
        write_atomically(self.path / "metrics.jsonl", text.encode())

    @property
    def final(self) -> dict[str, Any] | None:
        """The row that ends a run; None where training has not come to its end."""
        return next((row for row in reversed(self.metrics()) if row.get("kind") == "final"), None)

    def metrics(self) -> list[dict[str, Any]]:
        """All rows logged so far; a last line torn by a crash is left out.

        Raises:
            ValueError: If any other line is not a JSON object.
        """
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
        rows = []
        for number, line in enumerate(lines[:-1], start=1):  # only what a newline ends was written whole
            try:
                rows.append(decode(json.loads(line)))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: line {number} is not JSON: {error}") from None
        return rows

    def write_probe(self, name: str, label: str, values: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Path:
        """Write one record, as `losslab.records.to_record` splits it; returns the path of its JSON file.

        Args:
            name: The probe.
            label: What it was measured at: a step ("690"), or two runs ("adamw--sgd").
            values: The scalars, as a tree.
            arrays: The arrays, under dotted names.
        """
        path = self._probe_path(name, label)
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # the stubs take a key for allow_pickle
        write_atomically(path.with_name(f"{label}.npz"), buffer.getvalue())
        # The JSON file comes last: a record counts once it is there.
        write_json(path, {"probe": name, "label": label, "values": values})
        return path

    def read_record(self, name: str, label: str | None = None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Values and arrays as `losslab.records.from_record` takes them. Arguments as for `read_probe`."""
        path = self._probe_path(name, self._latest(name) if label is None else label)
        if not path.is_file():
            known = ", ".join(self.probes().get(name, [])) or "none"
            raise FileNotFoundError(f"{self.path}: no record {name}/{label}; there: {known}")
        values = _read_json(path)["values"]
        with np.load(path.with_name(f"{path.stem}.npz"), allow_pickle=False) as arrays:
            return values, dict(arrays)

    def read_probe(self, name: str, label: str | None = None) -> dict[str, Any]:
        """One record as a nested tree, with the arrays in their dotted places.

        Args:
            name: The probe.
            label: Which record; None takes the largest step, or the newest where labels are not steps.

        Raises:
            FileNotFoundError: If there is no such record.
        """
        values, arrays = self.read_record(name, label)
        tree = decode(values)
        for dotted, array in arrays.items():
            *parents, leaf = dotted.split(".")
            branch = tree
            for parent in parents:
                branch = branch.setdefault(parent, {})
            branch[leaf] = array
        return tree

    def probes(self) -> dict[str, list[str]]:
        """The labels of each probe's records, steps in numerical order."""
        records = sorted(self.path.glob("probes/*/*.json"))
        found: dict[str, list[str]] = {}
        for record in records:
            if not record.name.startswith("."):
                found.setdefault(record.parent.name, []).append(record.stem)
        return {name: sorted(labels, key=_step_then_name) for name, labels in found.items()}

    def _latest(self, name: str) -> str:
        labels = self.probes().get(name)
        if not labels:
            known = ", ".join(self.probes()) or "none"
            raise FileNotFoundError(f"{self.path}: no record of the probe {name!r}; there: {known}")
        if all(label.isdecimal() for label in labels):
            return labels[-1]
        return max(labels, key=lambda label: self._probe_path(name, label).stat().st_mtime_ns)

    def _probe_path(self, name: str, label: str) -> Path:
        for part in (name, label):
            if not _PLAIN_NAME.fullmatch(part):
                raise ValueError(f"a record's name takes letters, digits, '.', '_' and '-'; got {part!r}")
        return self.path / "probes" / name / f"{label}.json"


def run_folders(study: str | Path) -> dict[str, RunFolder]:
    """The runs of a study folder by name, in alphabetical order.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = Path(study)
    found = _runs_below(path)
    if not found:
        reason = "no run folder in it" if path.is_dir() else "no such folder"
        raise FileNotFoundError(f"{study}: {reason}; expected a study folder: one that holds run folders")
    return found


def write_json(path: str | Path, values: Mapping[str, Any]) -> None:
    """Write a JSON tree atomically, non-finite floats as `losslab.records.encode` spells them."""
    write_atomically(path, (json.dumps(encode(dict(values)), indent=2, allow_nan=False) + "\n").encode())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; is {path.parent} a run folder?") from None
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _runs_below(path: Path) -> dict[str, RunFolder]:
    below = [RunFolder(child) for child in sorted(path.iterdir())] if path.is_dir() else []
    return {folder.path.name: folder for folder in below if folder.is_run()}


def _step_then_name(label: str) -> tuple[int, str]:
    return (int(label), "") if label.isdecimal() else (-1, label)
