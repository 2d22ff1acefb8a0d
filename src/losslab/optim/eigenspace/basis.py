"""Covariances of gradients, side by side, and the bases in which they are nearly diagonal.

A = CQ, then the QR decomposition of its columns, largest eigenvalue first: one step of orthogonal iteration, from the
basis that is there (Golub & Van Loan, section 8.2.4). Householder's QR, since a polar factor or one Cholesky QR lose
the basis within a few steps. C is kept whole where its side is, otherwise as CQ.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from losslab.optim.eigenspace.coordinates import left_over, mean_square
from losslab.optim.eigenspace.layout import Layout, Side
from losslab.optim.eigenspace.options import TALTOptions
from losslab.optim.eigenspace.response import quantiles

RIDGE = 1e-3  # of the mean eigenvalue: directions without any gradient stay where they are


def observe(G: Tensor, state: Mapping[str, Tensor], of: Layout, step: int, options: TALTOptions) -> None:
    """Take a gradient (b, m, n) into the covariances, or among the last ones."""
    if of.remembered:
        state["recent"][:, (step - 1) % of.remembered] = G
        return
    keep = options.covariance_decay
    for name, side in of.sides:
        if not side.still:
            first, second = seen(G, state, name, side)
            state[f"covariance_{name}"].baddbmm_(first, second, beta=keep, alpha=1 - keep)


def seen(G: Tensor, state: Mapping[str, Tensor], name: str, side: Side) -> tuple[Tensor, Tensor]:
    """Two factors of what one gradient adds to a side's covariance."""
    A = G if name == "left" else G.mT
    return (A, A.mT) if side.whole else (A, torch.bmm(A.mT, state[f"basis_{name}"]))


def covariance(state: Mapping[str, Tensor], name: str, of: Layout, step: int) -> Tensor:
    """C (b, k, k) of a side, or CQ (b, k, r) where it is not kept whole."""
    if not of.remembered:
        return state[f"covariance_{name}"]
    there = min(step, of.remembered)
    recent = state["recent"][:, :there]
    A = (recent.transpose(1, 2) if name == "left" else recent.permute(0, 3, 1, 2)).flatten(2)
    side = of.left if name == "left" else of.right
    return A @ (A.mT if side.whole else A.mT @ state[f"basis_{name}"]) / there


def times_basis(C: Tensor, state: Mapping[str, Tensor], name: str, side: Side) -> Tensor:
    """CQ."""
    return C @ state[f"basis_{name}"] if side.whole else C


Bases = dict[str, tuple[Tensor, Tensor]]  # by side: the old columns in a new order (b, r), and the new basis (b, k, r)


def refresh(
    state: Mapping[str, Tensor], of: Layout, step: int, beta: float, options: TALTOptions, found: Bases | None = None
) -> None:
    """New bases, with everything that is written in their coordinates; new thresholds.

    Args:
        state: Stacked; changed in place.
        of: Its layout.
        step: Steps done.
        beta: How much of the average of squares is kept from one step to the next, for its bias.
        options: Fixes 3, 7 and 8.
        found: The new bases, where they are known; None finds them.
    """
    found = found or new_bases(copies(state, of, step, clone=False), step, options)
    table = state["exp_avg_sq"]
    for name, side in of.sides:
        if side.still:
            continue
        order, new = found[name]
        turn = torch.bmm(new.mT, state[f"basis_{name}"])
        if not side.whole and not of.remembered:  # C times the new basis, of what lies along the old one
            state[f"covariance_{name}"].copy_(state[f"covariance_{name}"] @ turn.mT)
        state[f"basis_{name}"].copy_(new)
        axis = 1 if name == "left" else 2
        if side.whole:
            average = state["exp_avg"]
            average.copy_(torch.bmm(turn, average) if axis == 1 else torch.bmm(average, turn.mT))
        table.copy_(_carried(table, order, turn, side, axis, options.transformation_stability))
    bias, (low, high) = 1 - beta**step, options.percentiles
    torch.div(quantiles(table, (low, 50.0, high)), bias, out=state["cuts"])
    mean = mean_square(table, of) / bias
    torch.maximum(state["peak"], mean, out=state["peak"])
    torch.lt(mean, options.near_fraction * state["peak"], out=state["near"])


Sides = dict[str, tuple[Tensor, Tensor, bool]]


def copies(state: Mapping[str, Tensor], of: Layout, step: int, *, clone: bool) -> Sides:
    """What new bases are found from: of each side the basis, its C or CQ, and whether it is kept whole."""
    sides = {}
    for name, side in of.sides:
        if not side.still:
            basis, C = state[f"basis_{name}"], covariance(state, name, of, step)
            sides[name] = (basis.clone(), C.clone(), side.whole) if clone else (basis, C, side.whole)
    return sides


def new_bases(sides: Sides, step: int, options: TALTOptions) -> Bases:
    """One step of orthogonal iteration; the first time, eigenvectors."""
    found = {}
    for name, (old, C, whole) in sides.items():
        A = torch.bmm(C, old) if whole else C
        values = (old * A).sum(1, keepdim=True)
        order = values[:, 0].argsort(1, descending=True)
        if step == 1 and whole:
            new = eigenvectors(C + RIDGE * torch.diag_embed(values.mean(2).expand(-1, C.shape[1])))
        else:
            blend = options.blend if options.transformation_stability else 1.0  # of A; a basis has no scale
            share = torch.add(values.mean(2, keepdim=True) * (RIDGE / blend), values, alpha=(1 - blend) / blend)
            mixed = torch.addcmul(A, share, old)
            new = orthonormal(mixed.gather(2, order[:, None].expand_as(mixed)))
        found[name] = (order, new)
    return found


def orthonormal(A: Tensor) -> Tensor:
    """Q of A's QR decomposition; torch.linalg.qr would cut R out as well, a tenth of its time."""
    return torch.linalg.householder_product(*torch.geqrf(A))


def eigenvectors(C: Tensor) -> Tensor:
    """Of symmetric matrices (b, k, k), largest eigenvalue first; in float64 where float32 does not converge, as with
    many equal eigenvalues.
    """
    try:
        return torch.linalg.eigh(C).eigenvectors.flip(2)
    except torch.linalg.LinAlgError:
        return torch.linalg.eigh(C.double()).eigenvectors.flip(2).to(C.dtype)


def _carried(table: Tensor, order: Tensor, turn: Tensor, side: Side, axis: int, mixes: bool) -> Tensor:
    """A table of squares, from the old basis of one side to the new one: each new direction has the squares of what it
    is made of, or, unmixed, those of the old direction of its rank.
    """
    if axis == 1:
        return _carried(table.mT, order, turn, side, 2, mixes).mT
    kept, rest = table[..., : side.kept], table[..., side.kept :]
    shares = turn.square()
    moved = torch.bmm(kept, shares.mT) if mixes else kept.gather(2, order[:, None].expand_as(kept))
    if side.whole:
        return moved
    if mixes:
        outside = side.length - side.kept
        moved = moved + rest * (1 - shares.sum(2))[:, None].clamp_min(0)
        total = kept.sum(2, keepdim=True) + outside * rest
        rest = left_over(total, moved.sum(2, keepdim=True), side)
    return torch.cat([moved, rest], 2)
