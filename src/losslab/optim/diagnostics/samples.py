"""From a stack's step, taken apart, to the records of its tensors; one wait for the device in all."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from losslab.optim.diagnostics import measures
from losslab.optim.diagnostics.history import History
from losslab.optim.diagnostics.sample import TALTSample
from losslab.optim.diagnostics.stages import Stages
from losslab.optim.eigenspace.options import TALTOptions
from losslab.optim.eigenspace.stack import Stack

Member = tuple[str, tuple[int, ...]]  # a tensor's name and shape


def samples_of(
    members: Sequence[Member], stack: Stack, stages: Stages, options: TALTOptions, history: History
) -> list[TALTSample]:
    """A record for each tensor of a stack.

    Args:
        members: Its tensors.
        stack: The state that the step met.
        stages: The step.
        options: Those of all of them.
        history: The samples before; this one is added.
    """
    of = stack.layout
    numbers = measures.of_step(stack, stages) | measures.of_spectrum(stack, stages) | measures.of_basis(stack)
    numbers |= measures.gate(stages, of, options.gate_width)
    numbers |= history.compare([name for name, _ in members], stack, stages)
    counted = {"refreshes": 0, "early": 1} if "refreshes" in stack.state else {}
    numbers |= {name: stack.state["refreshes"][:, place] for name, place in counted.items()}
    same = {"structure": of.structure, "trigger": options.trigger, "state_numbers": of.numbers}
    same |= {"rank_left": of.left.kept, "rank_right": of.right.kept, "remembered": of.remembered}
    rows = _rows(numbers, measures.series(stack, stages), [unit or 1.0 for unit in stack.units])
    return [
        TALTSample(step=stack.step + 1, name=name, shape=shape, **same, **row)  # type: ignore[arg-type]
        for (name, shape), row in zip(members, rows, strict=True)
    ]


def with_spreads(samples: Sequence[TALTSample]) -> list[TALTSample]:
    """The samples of one step, with how far the tensors' scales lie apart."""
    sizes = [max(1, torch.Size(sample.shape).numel()) ** 0.5 for sample in samples]
    spreads = {
        f"{name}_spread": measures.spread(
            [getattr(sample, f"{name}_norm") / size for sample, size in zip(samples, sizes, strict=True)]
        )
        for name in ("gradient", "update")
    }
    return [replace(sample, **spreads) for sample in samples]  # type: ignore[arg-type]


def _rows(numbers: dict[str, Tensor], series: dict[str, Tensor], units: list[float]) -> list[dict[str, Any]]:
    """For each tensor its numbers and its tuples of numbers, in the gradient's own units."""
    columns = [value[:, None] for value in numbers.values()] + list(series.values())
    table = torch.cat([column.to(columns[0].dtype) for column in columns], 1).tolist()
    whole = {"refreshes": int, "early": int, "near": bool}
    found = []
    for line, unit in zip(table, units, strict=True):
        scale = {name: unit**power for name, power in measures.IN_UNITS.items()}
        row: dict[str, Any] = {name: line[place] * scale.get(name, 1) for place, name in enumerate(numbers)}
        row |= {name: kind(row[name]) for name, kind in whole.items() if name in row}
        at = len(numbers)
        for name, tensor in series.items():
            row[name] = tuple(value * scale.get(name, 1) for value in line[at : at + tensor.shape[1]])
            at += tensor.shape[1]
        found.append(row)
    return found
