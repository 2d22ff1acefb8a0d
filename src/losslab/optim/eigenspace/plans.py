"""Which parameters of a group are stacked with which, remembered as long as nothing changes."""

from collections.abc import MutableMapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from losslab.optim.eigenspace.layout import STATE_NAMES, Layout, layout, new_state
from losslab.optim.eigenspace.options import TALTOptions, of_group
from losslab.optim.eigenspace.stack import Stack

OPTION_NAMES = tuple(field.name for field in fields(TALTOptions))
Stacks = list[tuple[list[Tensor], Stack]]
SHORT = 16_384  # entries up to which laying a gradient beside others takes less time than operations of its own


@dataclass(frozen=True)
class _Plan:
    """The stacks of the parameters that had gradients in the last step, and the settings they were made for."""

    asked: tuple[Any, ...]
    moved: tuple[Tensor, ...]
    stacks: Stacks
    views: tuple[Tensor, ...]

    def fits(self, asked: tuple[Any, ...], moved: tuple[Tensor, ...], states: MutableMapping[Tensor, Any]) -> bool:
        """Whether nothing has changed: settings, parameters, and the states, which a user may have set anew."""
        if self.asked != asked or len(self.moved) != len(moved):
            return False
        known = zip(self.moved, moved, self.views, strict=True)
        return all(old is new and states[new].get("exp_avg") is view for old, new, view in known)


class Plans:
    """The plans of all groups of an optimizer."""

    def __init__(self) -> None:
        self._plans: dict[int, _Plan] = {}

    def stacks(
        self, index: int, group: dict[str, Any], moved: tuple[Tensor, ...], states: MutableMapping[Tensor, Any]
    ) -> Stacks:
        """The parameters that move, by stacks; as in the last step where nothing has changed.

        Args:
            index: Of the group.
            group: Its settings.
            moved: Its parameters that have gradients.
            states: Of all parameters; they become views into the stacks.

        Raises:
            ValueError: The group's settings are not those with which a state was made.
        """
        asked = (group["structure"], *(group[name] for name in OPTION_NAMES))
        plan = self._plans.get(index)
        if plan is None or not plan.fits(asked, moved, states):
            self._forget(moved, states)
            stacks = _stacked(group, moved, states)
            views = tuple(states[parameter]["exp_avg"] for parameter in moved)
            plan = self._plans[index] = _Plan(asked, moved, stacks, views)
        return plan.stacks

    def settle(self) -> None:
        """Wait for what other threads are at, so that the states are whole."""
        for plan in self._plans.values():
            for _, stack in plan.stacks:
                if stack.coming is not None:
                    stack.settled()

    def _forget(self, moved: tuple[Tensor, ...], states: MutableMapping[Tensor, Any]) -> None:
        """Plans with any of these parameters: their states are about to become views into other stacks.

        States that are not get memory of their own, so that none keeps a whole stack alive.
        """
        self.settle()
        taken = set(moved)
        for plan in self._plans.values():
            for parameter in () if taken.isdisjoint(plan.moved) else plan.moved:
                if parameter not in taken and states.get(parameter):
                    own = {name: value for name, value in states[parameter].items() if isinstance(value, Tensor)}
                    states[parameter].update({name: value.clone() for name, value in own.items()})
        self._plans = {index: plan for index, plan in self._plans.items() if taken.isdisjoint(plan.moved)}


def _stacked(group: dict[str, Any], moved: tuple[Tensor, ...], states: MutableMapping[Tensor, Any]) -> Stacks:
    """Parameters of one layout, device, precision and age make one stack, and so do short vectors without a basis; new
    ones get their first state.
    """
    options = of_group(group)
    alike: dict[Any, list[Tensor]] = {}
    for parameter in moved:
        of = layout_of(parameter, group, options)
        if "step" not in states[parameter]:
            states[parameter].update(new_state(of, parameter))
        _require_shapes(states[parameter], of)
        precise = parameter.dtype == torch.float64
        alike.setdefault(
            (None if _laid(of, options) else of, parameter.device, precise, int(states[parameter]["step"])), []
        ).append(parameter)
    found = []
    for (of, *_), members in alike.items():
        own = [states[member] for member in members]
        found.append((members, Stack.of(own, of, options) if of else Stack.end_to_end(own, options)))
    return found


def _laid(of: Layout, options: TALTOptions) -> bool:
    """Whether a tensor is a vector without a basis, of which nothing is asked but entry by entry."""
    entrywise = options.power == 0.5 and options.match_rms is None
    return of.structure == "diagonal" and of.right.length <= SHORT and entrywise


def layout_of(parameter: Tensor, group: dict[str, Any], options: TALTOptions) -> Layout:
    """How a group's settings have TALT see a parameter."""
    return layout(parameter.shape, group["structure"], options, 8 if parameter.dtype == torch.float64 else 4)


def _require_shapes(state: dict[str, Tensor], of: Layout) -> None:
    # Other names are a user's own.
    there = {name: tuple(value.shape) for name, value in state.items() if name.startswith(STATE_NAMES)}
    if there != of.shapes:
        changed = min(set(there.items()) ^ set(of.shapes.items()))[0]
        raise ValueError(
            f"param_groups: expected settings with which the state was made, got others ({changed} has another shape); "
            "structure, sides and memory are fixed at a parameter's first step"
        )
