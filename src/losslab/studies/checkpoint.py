"""Checkpoints: each one safetensors file, whole or not at all, that holds the weights and all that a run goes on from.

The file's own tensors are the model's parameters and buffers by name, so that any reader of safetensors finds them;
those of the training state lie beside them under "training/". What is not a tensor is JSON in the file's header, with
the SHA-256 of all the rest. Nothing is ever unpickled.
"""

import hashlib
import json
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from losslab.probes.trajectories.snapshots import Snapshots
from losslab.records import decode, encode, write_atomically
from losslab.studies.packing import pack, unpack
from losslab.studies.record import RunFolder

_TRAINING = "training/"  # before the names of the training state's tensors
_LENGTH = 8  # bytes at a safetensors file's start: how long its header is, little-endian


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        step: Optimizer steps done.
        weights: Parameters and buffers by name, tied ones once.
        state: What belongs to the weights: epoch, metrics.
        training: What a run goes on from; None where only the weights were saved.
    """

    step: int
    weights: dict[str, Tensor]
    state: dict[str, Any]
    training: Any = None

    def put_into(self, model: nn.Module) -> None:
        """Write the weights into a model of the same architecture, in place.

        Raises:
            ValueError: It has other names or shapes.
        """
        expected = saved_tensors(model)
        wrong = [f"no {name}" for name in expected.keys() - self.weights.keys()]
        wrong += [f"unknown {name}" for name in self.weights.keys() - expected.keys()]
        wrong += [
            f"{name} of shape {tuple(self.weights[name].shape)} for {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in self.weights and self.weights[name].shape != tensor.shape
        ]
        if wrong:
            raise ValueError(f"not this model's weights: {', '.join(sorted(wrong)[:5])}")
        for name, tensor in expected.items():
            tensor.copy_(self.weights[name])


def save(
    folder: RunFolder, name: str, model: nn.Module, state: dict[str, Any], training: Any = None, *, step: int = 0
) -> None:
    """Write `checkpoints/<name>.safetensors`, in place of an older one.

    Args:
        folder: The run.
        name: "last", "best" or "step-<number>".
        model: Its parameters and buffers are saved, tied ones once.
        state: Plain values that belong to these weights.
        training: A tree of tensors and plain values that a run goes on from.
        step: Optimizer steps done.

    Raises:
        OSError: The disk is full, or the folder cannot be written; an older file is still there then.
    """
    packed, tensors = pack(training, _TRAINING)
    weights = {key: tensor.detach().cpu().contiguous() for key, tensor in saved_tensors(model).items()}
    header = {"step": step, "state": encode(state), "training": packed}
    content = _to_bytes({**weights, **tensors}, header)
    path = _path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_atomically(path, content)
    except OSError as error:
        kept = f"; the one of before is kept: {path.name}" if path.is_file() else ""
        why = error.strerror or error
        raise OSError(f"{path}: cannot write the checkpoint of step {step} ({why}){kept}") from error


def load(folder: RunFolder, name: str) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If the file is damaged.
    """
    path = _path(folder, name)
    if not path.is_file():
        known = ", ".join(names(folder)) or "none"
        raise FileNotFoundError(f"{path}: no such checkpoint; there: {known}")
    tensors, header = _from_bytes(path.read_bytes(), path)
    training = {key: tensor for key, tensor in tensors.items() if key.startswith(_TRAINING)}
    return Checkpoint(
        step=header["step"],
        weights={key: tensor for key, tensor in tensors.items() if key not in training},
        state=decode(header["state"]),
        training=unpack(header["training"], training),
    )


def names(folder: RunFolder) -> list[str]:
    """The checkpoints of a run, those that were kept on the way in the order of their steps."""
    found = [path.stem for path in (folder.path / "checkpoints").glob("*.safetensors") if path.stem[0] != "."]
    return sorted(found, key=lambda name: (name.startswith("step-"), len(name), name))


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, tied ones once: views that share the model's memory."""
    kept = model.state_dict().keys()
    every = chain(model.named_parameters(), model.named_buffers())
    return {name: tensor.detach() for name, tensor in every if name in kept}


def snapshots(folder: RunFolder) -> Snapshots:
    """The weights that were kept on the way: `snapshots/<step>.safetensors`."""
    return Snapshots(folder.path / "snapshots")


def _path(folder: RunFolder, name: str) -> Path:
    return folder.path / "checkpoints" / f"{name}.safetensors"


def _to_bytes(tensors: dict[str, Tensor], header: dict[str, Any]) -> bytes:
    plain = safetensors.torch.save(tensors)
    data, places = _split(plain)
    text = json.dumps(header, allow_nan=False)
    metadata = {"losslab": text, "sha256": _digest(places, text, data)}
    encoded = json.dumps({"__metadata__": metadata, **places}).encode()
    encoded += b" " * (-len(encoded) % _LENGTH)  # the tensors start at a multiple of eight bytes
    return len(encoded).to_bytes(_LENGTH, "little") + encoded + data


def _from_bytes(content: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        data, places = _split(content)
        metadata = places.pop("__metadata__")
        text, expected = metadata["losslab"], metadata["sha256"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: damaged, or no checkpoint of a run: expected losslab's header") from None
    if _digest(places, text, data) != expected:
        raise ValueError(f"{path}: damaged: its sha256 is not the one in its header; take another checkpoint")
    return safetensors.torch.load(content), json.loads(text)


def _split(content: bytes) -> tuple[memoryview, dict[str, Any]]:
    """The tensors' bytes, and the header that says which lie where."""
    length = int.from_bytes(content[:_LENGTH], "little")
    return memoryview(content)[_LENGTH + length :], json.loads(content[_LENGTH : _LENGTH + length])


def _digest(places: dict[str, Any], text: str, data: memoryview) -> str:
    digest = hashlib.sha256(json.dumps([places, text], sort_keys=True).encode())
    digest.update(data)
    return digest.hexdigest()
