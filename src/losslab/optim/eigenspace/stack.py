"""Tensors of one layout and one history, as one tensor with a leading axis: batched products do them all at once.

The state of each parameter is a view into its stack's, so that an optimizer's `state` is like any other's.
"""

import math
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from losslab.optim.eigenspace.basis import Bases, copies, new_bases
from losslab.optim.eigenspace.layout import Layout, Side
from losslab.optim.eigenspace.options import TALTOptions

# Gradients whose size is in between are taken as they are: even the squares of a direction with a millionth
# of it are far from the ends of float32, 1e-38 and 3e38.
SMALL, LARGE = 1e-10, 1e10
LAID = ("exp_avg", "exp_avg_sq")  # what is laid end to end where vectors are


@dataclass
class Stack:
    """States of b parameters, stacked.

    Vectors without a basis are laid end to end, as one row: their stack's averages are (1, 1, n) for n entries of all.

    Attributes:
        layout: Of all of them.
        options: Likewise.
        step: Steps done.
        due: The next one that ends with a new basis.
        state: By name, each (b, ...).
        states: The same by parameter, as views.
        lengths: Of the vectors that are laid end to end; none where tensors have the leading axis.
        units: The powers of two that the gradients are divided by, so that squares neither overflow nor vanish;
            0 as long as all gradients were.
        unit: The same (b, 1, 1), or (1, 1, n), 1 for 0; None where all are 1.
        coming: New bases that another thread is looking for.
    """

    layout: Layout
    options: TALTOptions
    step: int
    due: int
    state: dict[str, Tensor]
    states: Sequence[dict[str, Tensor]]
    lengths: tuple[int, ...]
    units: list[float]
    unit: Tensor | None = None
    coming: "Future[Bases] | None" = None

    @classmethod
    def of(cls, states: Sequence[dict[str, Tensor]], layout: Layout, options: TALTOptions) -> "Stack":
        """Stack states; from then on they are views."""
        return cls._of(states, layout, options, ())

    @classmethod
    def end_to_end(cls, states: Sequence[dict[str, Tensor]], options: TALTOptions) -> "Stack":
        """Lay vectors without a basis end to end, of whatever lengths."""
        lengths = tuple(state["exp_avg"].shape[1] for state in states)
        total = sum(lengths)
        of = Layout(Side(1, 1, still=True), Side(total, total, still=True), 0, "diagonal")
        return cls._of(states, of, options, lengths)

    @classmethod
    def _of(
        cls, states: Sequence[dict[str, Tensor]], layout: Layout, options: TALTOptions, lengths: tuple[int, ...]
    ) -> "Stack":
        stacked = {}
        for name in ("step", *layout.shapes):
            values = [state[name] for state in states]
            laid = lengths and name in LAID
            stacked[name] = whole = torch.cat(values, 1)[None] if laid else torch.stack(values)
            views = whole[0].split(lengths, 1) if laid else whole.unbind()
            for state, view in zip(states, views, strict=True):
                state[name] = view
        units, step = stacked["scale"].flatten().tolist(), int(stacked["step"][0])
        found = cls(layout, options, step, options.next_due(step), stacked, states, lengths, units)
        found._set_unit()
        return found

    def apart(self, X: Tensor) -> Sequence[Tensor]:
        """One (m, n) for each parameter."""
        return X[0].split(self.lengths, 1) if self.lengths else X.unbind()

    def look_ahead(self) -> None:
        """Have another thread find the bases of the next refresh, from the covariances of now."""
        sides = copies(self.state, self.layout, self.step, clone=True)
        self.coming = _worker(self.state["exp_avg"].device).submit(new_bases, sides, self.step + 1, self.options)

    def settled(self) -> Bases:
        """The bases that were looked for, as a part of the state: waits for them."""
        coming, self.coming = self.coming, None  # should it fail, those of the refresh before are there
        if coming is not None:
            for name, (order, new) in coming.result().items():
                self.state[f"order_{name}"].copy_(order)
                self.state[f"next_{name}"].copy_(new)
        return {
            name: (self.state[f"order_{name}"], self.state[f"next_{name}"])
            for name, side in self.layout.sides
            if not side.still
        }

    def in_units(self, gradients: Tensor, sizes: Sequence[float]) -> Tensor:
        """Gradients (b, m, n) divided by their units, chosen anew where their sizes do not fit."""
        changed = False
        for index, size in enumerate(sizes):
            unit = self.units[index]
            if size > 0 and (unit == 0 or size > unit * LARGE):
                self._change_unit(index, 1.0 if SMALL < size <= LARGE else self._power_of_two(size))
                changed = True
        if changed:
            self._set_unit()
        return gradients if self.unit is None else gradients / self.unit

    def _power_of_two(self, size: float) -> float:
        """The nearest one that the state's precision holds, with its inverse."""
        smallest = math.log2(torch.finfo(self.state["scale"].dtype).tiny)  # -126 or -1022
        return float(2.0 ** min(max(round(math.log2(size)), smallest), -smallest))

    def _change_unit(self, index: int, unit: float) -> None:
        ratio = self.units[index] / unit
        self.units[index] = unit
        for name, tensor in self.states[index].items():
            if name in ("exp_avg", "recent"):
                tensor.mul_(ratio)
            elif name in ("exp_avg_sq", "cuts", "peak") or name.startswith("covariance"):
                tensor.mul_(ratio**2)

    def _set_unit(self) -> None:
        scale = self.state["scale"]
        scale.copy_(scale.new_tensor(self.units).reshape(scale.shape))
        self.unit = None
        if not set(self.units) <= {0.0, 1.0}:
            unit = torch.where(scale == 0, 1.0, scale)
            lengths = torch.tensor(self.lengths, device=unit.device)
            self.unit = unit.flatten().repeat_interleave(lengths)[None, None] if self.lengths else unit


@cache
def _worker(device: torch.device) -> ThreadPoolExecutor:
    """One thread for all on a device: QR decompositions leave Python's lock to others."""
    # A new thread has no CUDA context, which cuBLAS warns of; waiting for the device makes one.
    ready = partial(torch.cuda.synchronize, device) if device.type == "cuda" else None
    return ThreadPoolExecutor(1, thread_name_prefix="talt", initializer=ready)


if hasattr(os, "register_at_fork"):  # a child has no such thread
    os.register_at_fork(after_in_child=_worker.cache_clear)
