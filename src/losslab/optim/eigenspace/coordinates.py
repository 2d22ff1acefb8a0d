"""Matrices in the coordinates of their bases, and back.

A side that is kept whole is rotated: X becomes QᵀX. A side of which only r directions are kept stays as it is, and
eigenvalues know it as r directions and all the others together: a table of squares has r entries along it, and one
more, their mean. All tensors have a leading axis b, over the tensors of a stack.
Products are torch.bmm: @ looks at shapes first, which is dear for small tensors.
"""

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from losslab.optim.eigenspace.layout import Layout, Side


def rotated(X: Tensor, state: Mapping[str, Tensor], of: Layout) -> Tensor:
    """X (b, m, n) along the bases of the sides that are kept whole."""
    if _turns(of.left):
        X = torch.bmm(state["basis_left"].mT, X)
    return torch.bmm(X, state["basis_right"]) if _turns(of.right) else X


def rotated_back(X: Tensor, state: Mapping[str, Tensor], of: Layout) -> Tensor:
    """The inverse of `rotated`."""
    if _turns(of.left):
        X = torch.bmm(state["basis_left"], X)
    return torch.bmm(X, state["basis_right"].mT) if _turns(of.right) else X


def squares(Z: Tensor, state: Mapping[str, Tensor], of: Layout) -> Tensor:
    """The table (b, left entries, right entries) of Z's squares, Z (b, m, n) as `rotated` gives it."""
    table = _squares_right(Z, state, of.right)
    if of.left.whole:
        return table
    kept = _squares_right(torch.bmm(state["basis_left"].mT, Z), state, of.right)
    rest = left_over(table.sum(1, keepdim=True), kept.sum(1, keepdim=True), of.left)
    return torch.cat([kept, rest], 1)


def _squares_right(Z: Tensor, state: Mapping[str, Tensor], side: Side) -> Tensor:
    if side.whole:
        return Z.square()
    kept = torch.bmm(Z, state["basis_right"]).square()
    rest = left_over(Z.square().sum(2, keepdim=True), kept.sum(2, keepdim=True), side)
    return torch.cat([kept, rest], 2)


def left_over(total: Tensor, kept: Tensor, side: Side) -> Tensor:
    """The mean square of each direction that is not kept: no smaller than what rounding of the total leaves of it.

    Where all of a gradient lies in the kept directions, the average gradient outside is rounding too, and must not be
    divided by less.
    """
    return torch.maximum(total - kept, torch.finfo(total.dtype).eps * total) / (side.length - side.kept)


def weighed(M: Tensor, response: Tensor, state: Mapping[str, Tensor], of: Layout) -> Tensor:
    """Each direction of M (b, m, n), times its entry in a table of responses."""
    if of.left.whole:
        return _weighed_right(M, response, state, of.right)
    basis, kept = state["basis_left"], of.left.kept
    inside = torch.bmm(basis.mT, M)
    outside = _weighed_right(torch.baddbmm(M, basis, inside, alpha=-1), response[:, kept:], state, of.right)
    return torch.baddbmm(outside, basis, _weighed_right(inside, response[:, :kept], state, of.right))


def _weighed_right(M: Tensor, response: Tensor, state: Mapping[str, Tensor], side: Side) -> Tensor:
    if side.whole:
        return M * response
    basis, kept, rest = state["basis_right"], response[..., : side.kept], response[..., side.kept :]
    return torch.baddbmm(M * rest, torch.bmm(M, basis) * (kept - rest), basis.mT)


def mean_square(table: Tensor, of: Layout) -> Tensor:
    """The mean (b, 1, 1) over all directions of a table of squares."""
    if of.left.whole and of.right.whole:
        return table.mean((1, 2), keepdim=True)
    left, right = (_weights(side, table.dtype, table.device) for side in (of.left, of.right))
    return (table * left[:, None] * right).sum((1, 2), keepdim=True) / (of.left.length * of.right.length)


@lru_cache
def _weights(side: Side, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(side.weights, dtype=dtype, device=device)


def _turns(side: Side) -> bool:
    return side.whole and not side.still
