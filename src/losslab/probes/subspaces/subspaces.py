"""Random subspaces θ₀ + P v of the parameters: P is (P, d) with columns of unit length, known by its products only."""

from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from losslab.memory import free_bytes
from losslab.params import ParameterSpace
from losslab.probes.subspaces.fastfood import Fastfood
from losslab.random import gaussian, make_generator

Kind = Literal["fastfood", "sparse", "dense"]
KINDS = get_args(Kind)


class Subspace(Protocol):
    """P by its products: `matvec(v)` = P v and `rmatvec(g)` = Pᵀ g."""

    dimension: int

    def matvec(self, vector: Tensor, /) -> Tensor:
        """P v: (d,) → (P,)."""

    def rmatvec(self, vector: Tensor, /) -> Tensor:
        """Pᵀ g: (P,) → (d,)."""


class Whole:
    """P = I: all directions."""

    def __init__(self, size: int):
        self.dimension = size

    def matvec(self, vector: Tensor) -> Tensor:
        """The vector itself."""
        return vector

    def rmatvec(self, vector: Tensor) -> Tensor:
        """The vector itself."""
        return vector


class Dense:
    """Normal entries, columns normalised. Memory and time: P·d."""

    def __init__(self, size: int, dimension: int, generator: torch.Generator, like: Tensor):
        _require_room("dense", size * dimension * like.element_size(), like.device)
        self.dimension = dimension
        # By rows of Pᵀ: so both products read it from front to back, twice as fast as by rows of P.
        self._rows = torch.empty(dimension, size, dtype=like.dtype, device=like.device)
        for row in self._rows:  # one by one: the first d columns are the same for every dimension
            row.copy_(gaussian((size,), generator, dtype=torch.promote_types(like.dtype, torch.float32)))
            row.div_(row.double().norm().to(like.dtype))

    def matvec(self, vector: Tensor) -> Tensor:
        """P v."""
        return vector @ self._rows

    def rmatvec(self, vector: Tensor) -> Tensor:
        """Pᵀ g."""
        return self._rows @ vector


class Sparse:
    """About √n entries in each column for a tensor of n, of either sign, and zeros. Memory and time: d Σ √n.

    The density is that of very sparse projections (P. Li, Hastie & Church 2006), tensor by tensor as C. Li et al. 2018
    take it. A tensor's n rows are divided into k = ⌊√n⌋ equal stretches with one entry ±√(n/k)/√P in each, at a random
    place (Kane & Nelson 2014): so a column is never empty, its length is exactly 1, and every parameter's direction has
    the same variance.
    """

    def __init__(self, space: ParameterSpace, dimension: int, generator: torch.Generator, like: Tensor):
        self.size, self.dimension = space.size, dimension
        counts = [int(size**0.5) for size in space.sizes]
        _require_room("sparse", 50 * dimension * sum(counts), like.device)  # bytes while it is drawn; then 12 to 16
        first, length, height = [], [], []
        offset = 0
        for size, count in zip(space.sizes, counts, strict=True):
            edges = torch.arange(count + 1, dtype=torch.int64) * size // count
            first.append(edges[:-1] + offset)
            length.append(edges[1:] - edges[:-1])
            height.append(torch.full((count,), (size / count / space.size) ** 0.5, dtype=torch.float64))
            offset += size
        draws = torch.rand(dimension, 2, sum(counts), generator=generator, dtype=torch.float64)
        rows = torch.cat(first) + (draws[:, 0] * torch.cat(length)).long()
        values = torch.cat(height) * torch.where(draws[:, 1] < 0.5, -1.0, 1.0)
        self._rows, self._values = rows.to(like.device), values.to(like)

    def matvec(self, vector: Tensor) -> Tensor:
        """P v."""
        entries = self._values * vector[:, None]
        return vector.new_zeros(self.size).index_add_(0, self._rows.view(-1), entries.view(-1))

    def rmatvec(self, vector: Tensor) -> Tensor:
        """Pᵀ g."""
        return (self._values * vector[self._rows]).sum(1)


def random_subspace(kind: Kind, space: ParameterSpace, dimension: int, seed: int | torch.Generator = 0) -> Subspace:
    """A random P with columns of unit length over all chosen parameters together, nearly orthogonal.

    Its first d columns are the same for every dimension: subspaces of one seed lie in each other.

    Args:
        kind: "fastfood": three numbers a parameter whatever d is, O(P log P) a product; columns are unit up to
            O(1/√P). "sparse": d Σ √n numbers over tensors of n. "dense": P·d.
        space: The parameters; products have its type and are on its device.
        dimension: d.
        seed: Of P.

    Raises:
        ValueError: An unknown kind, d not within 1 and P, or a matrix that takes more than half of the free memory.
    """
    if kind not in KINDS:
        raise ValueError(f"projection: expected one of {', '.join(KINDS)}, got {kind!r}")
    if type(dimension) is not int or not 1 <= dimension <= space.size:
        raise ValueError(f"dimension: expected 1 to {space.size}, the number of parameters, got {dimension!r}")
    generator, like = make_generator(seed), torch.empty(0, dtype=space.dtype, device=space.device)
    if kind == "sparse":
        return Sparse(space, dimension, generator, like)
    return (Dense if kind == "dense" else Fastfood)(space.size, dimension, generator, like)


def _require_room(kind: str, needed: int, device: torch.device) -> None:
    if needed > free_bytes(device) // 2:
        raise ValueError(
            f"projection: expected one that fits half of the free memory, got {kind!r} with {needed / 1e9:.1f} GB; "
            "use 'fastfood', or a smaller dimension"
        )
