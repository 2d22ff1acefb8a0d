"""How a tensor is seen as a matrix, what is kept of each of its sides, and the tensors of its state.

No matrix has more rows than columns: a higher one is seen transposed, so that an encoder's layers are stacked with its
decoder's. Needs only shapes, so that memory can be told before any of it is taken. b tensors of one layout are one
stack.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from losslab.optim.eigenspace.options import TALTOptions
from losslab.optim.eigenspace.polar import LONG

# What the names of a state's tensors begin with, but for the step count.
STATE_NAMES = (
    *("scale", "exp_avg", "cuts", "peak", "near", "rising", "refreshes"),
    *("basis_", "covariance_", "next_", "order_", "recent"),
)


@dataclass(frozen=True)
class Side:
    """One side of a matrix: `kept` directions of `length`, which never turn where it is `still`."""

    length: int
    kept: int
    still: bool

    @property
    def whole(self) -> bool:
        """Whether no direction is left out."""
        return self.kept == self.length

    @property
    def entries(self) -> int:
        """Numbers along this side of a table of eigenvalues: one each, and one for all that are left out."""
        return self.kept + (not self.whole)

    @property
    def weights(self) -> list[float]:
        """How many directions each entry stands for."""
        return [1.0] * self.kept + [float(self.length - self.kept)] * (not self.whole)


@dataclass(frozen=True)
class Layout:
    """A matrix with its two sides, and how it is treated.

    Attributes:
        left: Rows, the shorter side.
        right: Columns.
        remembered: How many gradients are, where covariances are the last ones'.
        structure: One of `options.STRUCTURES`, but "auto".
        ahead: Whether bases are looked for by another thread.
        orthogonal: Whether singular values are made equal.
    """

    left: Side
    right: Side
    remembered: int
    structure: str
    ahead: bool = False
    orthogonal: bool = False

    @property
    def sides(self) -> tuple[tuple[str, Side], ...]:
        """Both, with the suffix of their tensors' names."""
        return (("left", self.left), ("right", self.right))

    @property
    def turns(self) -> bool:
        """Whether there is any basis to find."""
        return not (self.left.still and self.right.still)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the state's tensors, but for the step count."""
        m, n = self.left.length, self.right.length
        found: dict[str, tuple[int, ...]] = {"scale": (1, 1), "exp_avg": (m, n)}
        if self.structure == "polar":
            return found
        found |= {
            "exp_avg_sq": (self.left.entries, self.right.entries),
            "cuts": (3, 1, 1),
            "peak": (1, 1),
            "near": (1, 1),
            "rising": (1, 1),
        }
        for name, side in self.sides:
            if not side.still:
                found["refreshes"] = (3,)  # how many, how many of them early, and the step of the last one
                found[f"basis_{name}"] = (side.length, side.kept)
                found[f"covariance_{name}"] = (side.length, side.kept)
                if self.ahead:
                    found |= {f"next_{name}": (side.length, side.kept), f"order_{name}": (side.kept,)}
        return found | ({"recent": (self.remembered, m, n)} if self.remembered else {})

    @property
    def overhead(self) -> float:
        """A step's operations over 6·m·n; forward and backward take one a token. m + n for whole sides."""
        short = self.left.length
        ratio = self.right.length / short
        parts = (4 * ratio + 10) if ratio >= LONG else (8 * ratio + 4)  # polar.py's products, in units of 2·short³
        iteration = short * parts / (3 * ratio)
        if self.structure == "polar":
            return iteration
        turning = [side for _, side in self.sides if not side.still]
        bases = sum(side.length if side.whole else 4 / 3 * side.kept for side in turning)
        return bases + iteration * self.orthogonal

    @property
    def numbers(self) -> int:
        """In the state, all together."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def layout(shape: Sequence[int], structure: str, options: TALTOptions, row_bytes: int = 4) -> Layout:
    """How TALT sees a tensor.

    Args:
        shape: Of the tensor: the first axis is one side of the matrix, all others the other one.
        structure: One of `options.STRUCTURES`.
        options: For the ranks.
        row_bytes: Of one number.
    """
    first = shape[0] if len(shape) > 1 else 1
    numbers = math.prod(shape)
    rows, columns = sorted((first, math.prod(shape[1:]) if len(shape) > 1 else numbers))
    if structure == "auto":
        structure = "kronecker" if len(shape) > 1 and columns > 1 else "diagonal"
    if not options.shapes and structure != "polar":
        structure = "diagonal"  # all directions alike: any basis will do
    if structure in ("diagonal", "lowrank"):
        rows, columns = 1, numbers
    still = structure in ("diagonal", "polar")
    longest = 1 if structure == "lowrank" else options.max_side
    left, right = (
        Side(
            length,
            length if fixed or length <= longest else options.rank(length, length * row_bytes),
            fixed,
        )
        for length, fixed in ((rows, still), (columns, still or (options.one_sided and columns > rows)))
    )
    remembers = not still and not options.incremental_covariance
    remembered = options.rank(numbers, numbers * row_bytes) if remembers else 0
    orthogonal = structure == "kronecker" and options.equalizes
    return Layout(left, right, remembered, structure, options.asynchronous, orthogonal)


def as_matrix(X: Tensor, of: Layout) -> Tensor:
    """A tensor as its layout sees it, (m, n)."""
    m, n = of.left.length, of.right.length
    return X.reshape(m, n) if m == 1 or m == X.shape[0] else X.reshape(n, m).mT


def as_tensor(M: Tensor, like: Tensor) -> Tensor:
    """The inverse of `as_matrix`: a matrix (m, n) in the shape and precision of a tensor."""
    if M.shape != like.shape:
        M = (M if M.shape[0] == 1 or M.shape[0] == like.shape[0] else M.mT).reshape(like.shape)
    return M if M.dtype == like.dtype else M.to(like.dtype)


def turned(state: dict[str, Any], of: Layout) -> dict[str, Any]:
    """A state, transposed or flattened where it is from before matrices were seen by their shorter side."""
    there, wanted = tuple(state["exp_avg"].shape) if "exp_avg" in state else (), of.shapes["exp_avg"]
    tables = [name for name in ("exp_avg", "exp_avg_sq", "recent") if name in state]
    if of.structure == "diagonal" and math.prod(there) == math.prod(wanted):
        return state | {name: state[name].reshape(wanted) for name in tables}
    if there == wanted or there != wanted[::-1]:
        return state
    found = state | {name: state[name].mT.contiguous() for name in tables}
    for name in [name for name in state if name.endswith("_left")]:
        kind = name.removesuffix("left")
        found[f"{kind}left"], found[f"{kind}right"] = state[f"{kind}right"], state[name]
    return found


def new_state(of: Layout, like: Tensor) -> dict[str, Tensor]:
    """The state of one tensor before its first step.

    Args:
        of: Its layout.
        like: Gives the device; numbers are float32, or float64 where it is.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    state = {
        name: torch.zeros(shape, dtype=torch.int64 if name.startswith("order") else dtype, device=like.device)
        for name, shape in of.shapes.items()
    }
    if "rising" in state:
        state["rising"].fill_(1.0)  # nothing is known to the contrary
    for name, _ in of.sides:
        if f"basis_{name}" in state:
            state[f"basis_{name}"].fill_diagonal_(1.0)
    return {"step": torch.zeros(()), **state}
