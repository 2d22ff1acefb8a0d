"""Checkpoints: weights as safetensors, state as JSON, each file whole or not at all; damage is noticed."""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from losslab.probes.trajectories.snapshots import Snapshots
from losslab.records import decode, write_atomically
from losslab.studies.record import RunFolder, write_json


def save(folder: RunFolder, name: str, model: nn.Module, state: dict[str, Any]) -> None:
    """Write `checkpoints/<name>.safetensors` and `.json`, in place of older ones.

    Args:
        folder: The run.
        name: "last" or "best".
        model: Its parameters and buffers are saved, tied ones once.
        state: What belongs to these weights: step, epoch, metrics. The weights' SHA-256 is added.
    """
    weights, description = _paths(folder, name)
    weights.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:  # save_model knows tied weights, but wants a path
        scratch = Path(temporary) / weights.name
        save_model(model, str(scratch))
        content = scratch.read_bytes()
    write_atomically(weights, content)
    write_json(description, {**state, "sha256": hashlib.sha256(content).hexdigest()})


def load(folder: RunFolder, name: str, model: nn.Module) -> dict[str, Any]:
    """Put a checkpoint's weights into `model` and return its state.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If a file is damaged, or the weights are another model's.
    """
    weights, description = _paths(folder, name)
    for path in (weights, description):
        if not path.is_file():
            known = ", ".join(sorted(path.stem for path in weights.parent.glob("*.safetensors"))) or "none"
            raise FileNotFoundError(f"{path}: no such checkpoint; there: {known}")
    try:
        state = decode(json.loads(description.read_text(encoding="utf-8")))
        expected = state["sha256"]
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{description}: damaged: expected JSON with the weights' sha256") from None
    found = hashlib.sha256(weights.read_bytes()).hexdigest()
    if found != expected:
        raise ValueError(f"{weights}: damaged: its sha256 differs from {description.name}'s; train again")
    try:
        load_model(model, str(weights))
    except (RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{weights}: not this model's weights: {reason}") from None
    return state


def snapshots(folder: RunFolder) -> Snapshots:
    """The weights that were kept on the way: `snapshots/<step>.safetensors`."""
    return Snapshots(folder.path / "snapshots")


def _paths(folder: RunFolder, name: str) -> tuple[Path, Path]:
    stem = folder.path / "checkpoints" / name
    return stem.with_suffix(".safetensors"), stem.with_suffix(".json")
