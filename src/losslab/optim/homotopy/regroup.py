"""Layers as an optimizer's parameter groups: their names, and groups of their own, whose other settings they keep."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from losslab.optim.homotopy.curvature import trainable


def layer_of(group: dict[str, Any], index: int) -> str:
    """The name of a group's layer.

    >>> layer_of({"name": "head"}, 2), layer_of({}, 2)
    ('head', 'group 2')
    """
    return str(group.get("name", f"group {index}"))


class LayerNames:
    """Which layer does each parameter group of an optimizer belong to?

    Attributes:
        of_groups: The names, group by group.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.of_groups = optimizer, list[str]()

    def adopt(self) -> list[str]:
        """Names of the groups that have none yet."""
        start = len(self.of_groups)
        fresh = [layer_of(group, i) for i, group in enumerate(self.optimizer.param_groups[start:], start=start)]
        self.of_groups += fresh
        return fresh

    def first(self, rates: Sequence[float | Tensor]) -> dict[str, float]:
        """Of a number for each group that of the first one with parameters, by layer."""
        found: dict[str, float] = {}
        for name, rate, group in zip(self.of_groups, rates, self.optimizer.param_groups, strict=True):
            if group["params"]:
                found.setdefault(name, float(rate))
        return found

    def moving(self) -> int:
        """How many parameters are not frozen."""
        return sum(parameter.requires_grad for group in self.optimizer.param_groups for parameter in group["params"])

    def trainable(self) -> dict[str, list[Tensor]]:
        """The parameters of each layer that has trainable ones."""
        found: dict[str, list[Tensor]] = {}
        for name, group in zip(self.of_groups, self.optimizer.param_groups, strict=True):
            if chosen := trainable(group["params"]):
                found.setdefault(name, []).extend(chosen)
        return found


def regrouped(optimizer: Optimizer, name: str, params: Sequence[Tensor] | Tensor, *, add: bool = False) -> list[int]:
    """Move parameters into new groups at the end, one for each group that they come from; their state stays theirs.

    A group that loses all of its parameters stays, empty: the numbers of the others are in every saved state.

    Args:
        optimizer: Any.
        name: Of the new groups.
        params: At least one, each once.
        add: Whether they are new to the optimizer, rather than to be moved.

    Returns:
        The indices of the groups that they came from, in order; those of the new ones are the last, as many.

    Raises:
        ValueError: There is no parameter, one stands twice, or one is not the optimizer's, or is already with `add`.
    """
    chosen = [params] if isinstance(params, Tensor) else list(params)
    wanted = {id(parameter) for parameter in chosen}
    if not chosen or len(wanted) < len(chosen):
        raise ValueError(f"params: expected the parameters of layer {name!r}, each once, got {len(chosen)}")
    groups = list(optimizer.param_groups)
    there = {id(parameter) for group in groups for parameter in group["params"]}
    if add:
        if wanted & there:
            raise ValueError(f"params: expected parameters that are in no other layer, got some for {name!r} that are")
        optimizer.add_param_group({"params": chosen, "name": name})
        return [0]
    if wanted - there:
        raise ValueError(f"params: expected parameters of the optimizer for layer {name!r}, got one that it lacks")
    sources = [i for i, group in enumerate(groups) if any(id(p) in wanted for p in group["params"])]
    for group in (groups[i] for i in sources):
        _split(optimizer, group, wanted, name)
    return sources


def _split(optimizer: Optimizer, group: dict[str, Any], wanted: set[int], name: str) -> None:
    settings = {key: value for key, value in group.items() if key not in ("params", "param_names", "name")}
    names = group.get("param_names")
    members = list(zip(names, group["params"], strict=True)) if names else [(None, p) for p in group["params"]]
    kept, moved = ([m for m in members if (id(m[1]) in wanted) is out] for out in (False, True))
    group["params"] = [parameter for _, parameter in kept]
    if names:
        group["param_names"] = [of for of, _ in kept]
    optimizer.add_param_group({**settings, "params": moved if names else [p for _, p in moved], "name": name})
