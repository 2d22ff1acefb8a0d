"""Trees of tensors and plain values <-> a JSON tree and named tensors: state that a file can hold without pickle."""

from typing import Any

import torch
from torch import Tensor


def pack(tree: Any, prefix: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Take the tensors out of a tree of dicts, lists, tuples, numbers, texts and None.

    Args:
        tree: For example an optimizer's `state_dict()`. Keys of dicts may be numbers.
        prefix: Before the tensors' names.

    Returns:
        What JSON can hold, with a mark in each tensor's place, and the tensors by name.

    Raises:
        TypeError: Something else is in the tree, which no file without pickle could give back.
    """
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            tensors[name] = value.detach().cpu().contiguous()
            # Where the numbers lay in memory decides the order of later sums, and with it their last bits.
            return {"tensor": name, "stride": list(value.stride())}
        if isinstance(value, dict):
            return {"dict": [[key, walk(item, f"{name}.{key}")] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [walk(item, f"{name}.{i}") for i, item in enumerate(value)]}
        if isinstance(value, float):
            return {"float": value.hex()}  # exact, and JSON has no infinity
        if value is None or isinstance(value, bool | int | str):
            return value
        raise TypeError(f"{name}: expected tensors and plain values, got {type(value).__name__}")

    return walk(tree, prefix), tensors


def unpack(packed: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree that `pack` took apart, each tensor laid out in memory as it was."""
    if not isinstance(packed, dict):
        return packed
    if "tensor" in packed:
        tensor = tensors[packed["tensor"]]
        return torch.empty_strided(tensor.shape, packed["stride"], dtype=tensor.dtype).copy_(tensor)
    if "dict" in packed:
        return {key: unpack(item, tensors) for key, item in packed["dict"]}
    if "float" in packed:
        return float.fromhex(packed["float"])
    ((kind, values),) = packed.items()
    items = [unpack(item, tensors) for item in values]
    return items if kind == "list" else tuple(items)
