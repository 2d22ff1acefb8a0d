"""One batch of any usual kind -> how the model is called, what the loss function gets, how many examples it holds.

| batch | model call | loss call |
| --- | --- | --- |
| `(inputs, targets)` | `model(inputs)` | `loss_fn(output, targets)` |
| `(a, b, …, targets)` | `model(a, b, …)` | `loss_fn(output, targets)` |
| mapping (transformers) | `model(**those keys that forward names)` | `loss_fn(output, batch)` |
| a dataclass or any other object | `model(batch)` | `loss_fn(output, batch)` |
| `[inputs]` (a TensorDataset of one tensor) | `model(inputs)` | `loss_fn(output, batch)`: `batch[0]` are the inputs |

A loss of more than targets takes them together: batches `(inputs, (targets, weights))`, and
`lambda output, both: loss(output, *both)`.

Examples lie on the first axis of inputs and targets. Where they do not, as in sequences (time, examples, …), the risk
is told how many a batch holds (`count_examples`), and what would take some examples of a batch refuses it.

Inputs that are themselves mappings or tuples are unpacked by the same rules. Without a loss function the model's output
must carry its own `.loss`.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from losslab.operators.losses import (  # noqa: F401  # a batch and its loss are read from one place
    LossFunction,
    batch_loss,
    reduction_of,
    require_equal_weights,
    stated_reduction,
)


@runtime_checkable
class _Dataclass(Protocol):
    """Any dataclass, for `isinstance`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


def map_tensors(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same batch (tuples, dicts, dataclasses, nested) with `function` applied to every tensor in it, in order."""

    def visit(item: Any) -> Any:
        if isinstance(item, Tensor):
            return function(item)
        fields = {f.name: map_tensors(getattr(item, f.name), function) for f in dataclasses.fields(item) if f.init}
        return dataclasses.replace(item, **fields)

    return apply_to_collection(batch, (Tensor, _Dataclass), visit)  # by itself it refuses frozen dataclasses


def to_device(batch: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """The batch on the device, and its real numbers in another precision if one is given."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking=device.type != "cpu")

    return map_tensors(batch, move)


def tensors_of(batch: Any) -> list[Tensor]:
    """The tensors in a batch, in order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(batch, note)
    return found


def count_examples(batch: Any) -> int:
    """The length of the first axis of the first tensor that has one; the targets, where they are tensors, have it too.

    Raises:
        ValueError: There is no such tensor, or the targets' first axis has another length: sequences of the shape
            (time, examples, …) with targets (examples,), or targets of all examples in one.
    """
    first = next((tensor for tensor in tensors_of(batch) if tensor.ndim), None)
    if first is None:
        raise ValueError(
            f"batches: expected batches that hold a tensor with an example axis, got {type(batch).__name__} without "
            "one (a NumPy array is none: use torch.as_tensor); pass count_examples=… to say how many examples a batch "
            "holds"
        )
    targets = _target_tensors(batch)
    if targets and all(len(target) != len(first) for target in targets):
        raise ValueError(
            f"batches: expected the examples on the first axis of inputs and targets, got shapes "
            f"{tuple(first.shape)} and {tuple(targets[0].shape)}; put them there, or pass count_examples=…, "
            "for example lambda batch: batch[0].shape[1]"
        )
    return len(first)


def _target_tensors(batch: Any) -> list[Tensor]:
    """Targets that are tensors, one or a tuple of them, or the `labels` of a mapping; those without axes left out."""
    targets = targets_of(batch)
    if isinstance(targets, Mapping):
        targets = targets.get("labels")
    found = targets if type(targets) is tuple else (targets,)
    return [target for target in found if isinstance(target, Tensor) and target.ndim]


def on_first_axis(batch: Any, count: int, caller: str) -> list[bool]:
    """Which of a batch's tensors hold one entry an example.

    At least one of the inputs does, and one of the targets that are tensors, or there is a ValueError in the caller's
    name: targets that were cut beside whole inputs would belong to other examples.
    """

    def holds(tensor: Tensor) -> bool:
        return tensor.ndim > 0 and len(tensor) == count

    tensors, targets = tensors_of(batch), _target_tensors(batch)
    inputs = tensors_of(batch[:-1]) if _is_pair(batch) else tensors
    if not all(any(map(holds, part)) for part in (inputs or tensors, targets or tensors)):
        shapes = [tuple(tensor.shape) for tensor in tensors]
        raise ValueError(
            f"{caller}: expected a tensor with the batch's {count} examples on its first axis, "
            f"got shapes {shapes}; put the examples first"
        )
    return [holds(tensor) for tensor in tensors]


def rows_of(batch: Any, count: int, rows: slice | Tensor, caller: str) -> Any:
    """The batch that holds these of its `count` examples alone; raises as `on_first_axis`."""
    own = iter(on_first_axis(batch, count, caller))

    def taken(tensor: Tensor) -> Tensor:
        if not next(own):
            return tensor
        return tensor[rows.to(tensor.device) if isinstance(rows, Tensor) else rows]

    return map_tensors(batch, taken)


def check_reiterable(batches: Any) -> None:
    """Refuse what can be read only once: every product reads the data anew."""
    if not isinstance(batches, Iterable):
        raise TypeError(
            f"batches: expected an iterable of batches such as a DataLoader or a list of (inputs, targets), "
            f"got {type(batches).__name__}"
        )
    if isinstance(batches, Tensor | Mapping | str):
        kind = type(batches).__name__
        raise TypeError(f"batches: expected an iterable of batches, got one {kind}; put it into a list")
    if isinstance(batches, list | tuple) and _is_one_batch(batches):
        raise TypeError(
            "batches: expected a list of batches, got what looks like one: inputs and targets; pass [(x, y)]"
        )
    if isinstance(batches, Iterator):
        raise ValueError(
            f"batches: expected something that can be read many times, got a one-time {type(batches).__name__}; "
            "pass list(batches)"
        )


def _is_one_batch(items: Sequence[Any]) -> bool:
    """Tensors of different kinds cannot be batches of one data set: they are the parts of one batch."""
    kinds = {(item.dtype, item.ndim) if isinstance(item, Tensor) else None for item in items}
    return len(kinds) > 1 and None not in kinds


def generators_of(batches: Any) -> list[torch.Generator]:
    """The random generators that a DataLoader and its samplers hold themselves."""
    inner = getattr(batches, "batch_sampler", None)
    owners = [batches, getattr(batches, "sampler", None), inner, getattr(inner, "sampler", None)]
    found = {id(g): g for g in (getattr(owner, "generator", None) for owner in owners)}
    return [generator for generator in found.values() if isinstance(generator, torch.Generator)]


def call_model(model: Callable[..., Any], batch: Any, signature_of: nn.Module) -> Any:
    """The model's output for a batch; `signature_of` is the module whose `forward` names the arguments."""
    return _call(model, batch[:-1] if _is_pair(batch) else (batch,), signature_of)


def targets_of(batch: Any) -> Any:
    """What the loss function gets beside the output."""
    return batch[-1] if _is_pair(batch) else batch


def _is_pair(batch: Any) -> bool:
    """Whether the last item is the target: plain tuples and lists of two or more (a named tuple is an object)."""
    return isinstance(batch, list | tuple) and not hasattr(batch, "_fields") and len(batch) >= 2


def _call(model: Callable[..., Any], arguments: tuple[Any, ...] | list[Any], signature_of: nn.Module) -> Any:
    if len(arguments) == 1 and isinstance(arguments[0], Mapping):
        named = _named_arguments(arguments[0], signature_of)
        return model(**named) if named else model(arguments[0])
    if len(arguments) == 1 and type(arguments[0]) in (tuple, list):
        return model(*arguments[0])
    return model(*arguments)


def _named_arguments(mapping: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """The entries that `forward` has arguments for (all, where it takes **kwargs): as transformers' Trainer does."""
    parameters = inspect.signature(module.forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(mapping)
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return {key: value for key, value in mapping.items() if key in names}
