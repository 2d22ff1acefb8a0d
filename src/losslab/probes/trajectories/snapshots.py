"""Snapshots of a training: weights, and what the optimizer did with a gradient; one file each, whole or not at all."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer

from losslab.operators.update_rule import UpdateRule, update_rule
from losslab.records import decode, encode, write_atomically

_WEIGHTS, _PRECONDITIONER = "weights/", "preconditioner/"  # before the names in a file


@dataclass(frozen=True)
class Snapshot:
    """A network after `step` optimizer steps.

    Attributes:
        step: Steps done.
        weights: Parameters and buffers by name, tied ones once.
        rule: What the optimizer does with a gradient; None where it is not known.
    """

    step: int
    weights: dict[str, Tensor]
    rule: UpdateRule | None = None

    @classmethod
    def of(cls, step: int, model: nn.Module, optimizer: Optimizer | None = None) -> "Snapshot":
        """A copy, on the host, of where the model is now.

        Raises:
            ValueError: step is not a number >= 0, or the optimizer moves none of the model's parameters.
        """
        if type(step) is not int or step < 0:
            raise ValueError(f"step: expected a number of steps >= 0, got {step!r}")
        model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper names its parameters otherwise
        if optimizer is not None:
            _require_same(model, optimizer)
        weights = {name: _copy(tensor) for name, tensor in _state(model).items()}
        return cls(step, weights, None if optimizer is None else update_rule(model, optimizer))

    def __str__(self) -> str:
        size = sum(tensor.numel() for tensor in self.weights.values())
        return f"step {self.step}: {size} numbers in {len(self.weights)} tensors" + (
            f", {self.rule}" if self.rule else ""
        )

    @torch.no_grad()
    def put_into(self, model: nn.Module) -> None:
        """Write the weights into a model of the same architecture, in place.

        Raises:
            ValueError: It has other names or shapes.
        """
        for name, tensor in _state(model).items():
            shape = self.weights[name].shape if name in self.weights else None
            if shape != tensor.shape:
                got = "nothing of that name" if shape is None else tuple(shape)
                expected = f"{name!r} of shape {tuple(tensor.shape)}"
                raise ValueError(f"snapshots: expected {expected}, got {got}; use the same architecture")
            tensor.copy_(self.weights[name])


class Snapshots(Sequence[Snapshot]):
    """Where did training go?  Snapshots in the order of their steps, for `trajectory`.

    In a training loop of one's own:

        snapshots = Snapshots("runs/mine/snapshots")
        for step, (x, y) in enumerate(loader):
            if step % 50 == 0:
                snapshots.take(step, model, optimizer)
            ...

    Args:
        folder: Where to keep them, and where earlier ones are read from when they are needed. Each is one safetensors
            file `<step>.safetensors`, written at once and whole or not at all, so that what was taken survives a
            crash. None keeps them in memory.
    """

    def __init__(self, folder: str | Path | None = None):
        self.folder = None if folder is None else Path(folder)
        self._kept: dict[int, Snapshot] = {}

    def take(self, step: int, model: nn.Module, optimizer: Optimizer | None = None) -> None:
        """Keep where the model is now, after `step` steps of the optimizer; one of the same step is replaced.

        With the optimizer its learning rate, its stability bound and its preconditioner are kept too
        (`update_rule`). Cost: a copy of the weights on the host, two with an adaptive optimizer.

        Raises:
            ValueError: step is not a number >= 0, or the optimizer is that of another model.
        """
        snapshot = Snapshot.of(step, model, optimizer)
        if self.folder is None:
            self._kept[step] = snapshot
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path(step), _to_bytes(snapshot))

    @property
    def steps(self) -> list[int]:
        """The steps at which there is a snapshot, in order."""
        if self.folder is None:
            return sorted(self._kept)
        return sorted(int(path.stem) for path in self.folder.glob("*.safetensors") if path.stem.isdecimal())

    def __len__(self) -> int:
        return len(self.steps)

    @overload
    def __getitem__(self, index: int) -> Snapshot: ...
    @overload
    def __getitem__(self, index: slice) -> list[Snapshot]: ...
    def __getitem__(self, index: int | slice) -> Snapshot | list[Snapshot]:
        """The snapshot at a place in the order.

        Raises:
            ValueError: Its file is damaged.
        """
        if isinstance(index, slice):
            return [self._read(step) for step in self.steps[index]]
        return self._read(self.steps[index])

    def __repr__(self) -> str:
        where = "in memory" if self.folder is None else f"in {self.folder}"
        return f"Snapshots({len(self)} {where})"

    def _path(self, step: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{step}.safetensors"

    def _read(self, step: int) -> Snapshot:
        if self.folder is None:
            return self._kept[step]
        path = self._path(step)
        try:
            with safe_open(path, framework="pt") as file:
                values = decode(json.loads(file.metadata()["snapshot"]))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        except (SafetensorError, ValueError, KeyError, TypeError):
            raise ValueError(f"{path}: damaged: expected a snapshot that losslab wrote; remove it") from None
        parts = [
            {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            for prefix in (_WEIGHTS, _PRECONDITIONER)
        ]
        rule = values["rule"]
        return Snapshot(step, parts[0], None if rule is None else UpdateRule(preconditioner=parts[1], **rule))


def _to_bytes(snapshot: Snapshot) -> bytes:
    rule, tensors = None, {_WEIGHTS + name: tensor for name, tensor in snapshot.weights.items()}
    if snapshot.rule is not None:
        rule = {key: getattr(snapshot.rule, key) for key in ("learning_rate", "bound", "decay")}
        tensors |= {_PRECONDITIONER + name: tensor for name, tensor in snapshot.rule.preconditioner.items()}
    return save(tensors, {"snapshot": json.dumps(encode({"rule": rule}), allow_nan=False)})


def _require_same(model: nn.Module, optimizer: Optimizer) -> None:
    """Refuse an optimizer of another model: its bound and preconditioner would be kept as this one's."""
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError(
            "optimizer: expected one that moves the model's parameters, got one of other tensors; "
            "make it from this model's parameters(), after any deepcopy"
        )


def _state(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _copy(tensor: Tensor) -> Tensor:
    # In the plain layout, which is what safetensors can hold.
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
