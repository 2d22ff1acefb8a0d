"""BlockDiagonal: the blocks of a matrix that belong to one layer each, and zeros between layers."""

import fnmatch
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from losslab.operators.base import LinearOperator
from losslab.operators.hessian import Hessian
from losslab.operators.required import require_risk
from losslab.operators.risk import EmpiricalRisk
from losslab.ranks import Split


class BlockDiagonal(LinearOperator):
    """What is left of a matrix when layers do not interact?  diag(A₁, …, A_B), A_b the part of A within layer b.

    Each block is an operator of its own on `risk.restrict(…)`, so that `eigenpairs(operator.blocks["layer3"])` answers
    for one layer. All are fixed at the point where the model is when this is made.

    Args:
        risk: Whose chosen parameters the blocks divide. Each block gets an even share of its `graph_memory`.
        make: What makes a block from a risk: `Hessian`, `GradientCovariance`, or a function of one's own.
        blocks: Names with the pattern or patterns of each block's parameters; default: one block a module that holds
            parameters of its own, under the module's name ("" for the model itself). Tied weights go by their first
            name.

    Attributes:
        blocks: Name -> operator.

    Cost: a product with each block, and so B forward passes instead of one; a block's backward pass ends at its layer.
    Memory: one copy of the model.

    Raises:
        ValueError: Blocks that overlap, leave a chosen parameter out, or match none; or what `make` raises.
    """

    def __init__(
        self,
        risk: EmpiricalRisk,
        make: Callable[[EmpiricalRisk], LinearOperator] = Hessian,
        *,
        blocks: Mapping[str, str | Sequence[str]] | None = None,
    ):
        require_risk(risk)
        names = by_module(risk.space.names) if blocks is None else _by_pattern(risk.space.names, blocks)
        self.size, self.dtype, self.device = risk.space.size, risk.dtype, risk.device
        self._space, self._split = risk.space, Split(risk.space.size, risk.ranks)
        share = risk.graph_budget() // len(names)
        still = risk.to(risk.device)  # a copy: to each block the others' parameters are ones that were not chosen
        self._parts = {block: still.restrict(members) for block, members in names.items()}
        for part in self._parts.values():
            part.graph_memory = share
        self.blocks = {block: make(part) for block, part in self._parts.items()}

    @property
    def precision(self) -> float:
        """That of the least precise block."""
        return max(block.precision for block in self.blocks.values())

    @property
    def split(self) -> Split:
        """Even parts over the risk's processes."""
        return self._split

    def _matmat(self, matrix: Tensor) -> Tensor:
        pieces = dict(zip(self._space.names, matrix.split(self._space.sizes), strict=True))
        for name, block in self.blocks.items():
            space = self._parts[name].space
            product = block.matmat(torch.cat([pieces[member] for member in space.names]))
            pieces |= zip(space.names, product.split(space.sizes), strict=True)
        return torch.cat(list(pieces.values()))


def by_module(names: Sequence[str]) -> dict[str, list[str]]:
    """The parameters of each module that holds some itself, in order.

    >>> by_module(["scale", "conv.weight", "conv.bias", "head.weight"])
    {'': ['scale'], 'conv': ['conv.weight', 'conv.bias'], 'head': ['head.weight']}
    """
    modules: dict[str, list[str]] = {}
    for name in names:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    return modules


def _by_pattern(names: Sequence[str], blocks: Mapping[str, str | Sequence[str]]) -> dict[str, list[str]]:
    owner: dict[str, str] = {}
    for block, select in blocks.items():
        for pattern in [select] if isinstance(select, str) else select:
            members = fnmatch.filter(names, pattern)
            if not members:
                known = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
                raise ValueError(f"blocks[{block!r}]: no chosen parameter matches {pattern!r}; there are {known}")
            for name in members:
                if owner.setdefault(name, block) != block:
                    raise ValueError(
                        f"blocks: expected each parameter in one block, got {name!r} in {owner[name]!r} and {block!r}"
                    )
    missing = [name for name in names if name not in owner]
    if missing:
        raise ValueError(
            f"blocks: expected every chosen parameter in a block, got none for {missing[0]!r}; "
            "add a block for it, or leave it out with risk.restrict(…)"
        )
    return {block: [name for name in names if owner[name] == block] for block in blocks}
