"""Fastfood: a random projection that needs O(P) memory and O(P log P) time (Le, Sarlós & Smola 2013)."""

import math
from functools import lru_cache

import torch
from scipy.linalg import hadamard
from torch import Tensor

from losslab.random import gaussian, rademacher

# H_n is taken apart into Kronecker factors of this size, each one batched matrix product. At n = 2²⁰ on one core a
# factor of 32 takes 5 ms, of 8 or 64 8 ms, butterflies of additions 9 to 13 ms.
_FACTOR = 32


def hadamard_transform(vector: Tensor) -> Tensor:
    """H x for a vector of shape (n,), n a power of two; H_2n = [[H_n, H_n], [H_n, −H_n]], not normalised.

    H_n = … ⊗ H_b ⊗ H_a, so that each factor is a product over one axis of x seen as a (…, b, a) array. H is symmetric,
    and H H = n I. Cost: O(n log n), memory for one more vector.

    >>> hadamard_transform(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist()
    [10.0, -2.0, -4.0, 0.0]
    """
    size, done = len(vector), 1
    if size & (size - 1) or not size:
        raise ValueError(f"vector: expected a power of two as length, got {size}; pad with zeros")
    while done < size:
        factor = min(_FACTOR, size // done)
        matrix = _hadamard(factor, vector.dtype, vector.device)
        # The last axis from the right: as a batch of products with single columns it would take ten times as long.
        product = vector.view(-1, factor) @ matrix if done == 1 else matrix @ vector.view(-1, factor, done)
        vector, done = product.view(-1), done * factor
    return vector


class Fastfood:
    """P = S H G Π H B, a (P, d) matrix with columns of unit length up to O(1/√P), as products only.

    With L the next power of two from P: B holds signs, Π permutes L entries, G is a diagonal of normal numbers, H the
    Hadamard matrix (L, L); S keeps the first P rows and scales by 1/(√L ‖G‖ √(P/L)), which makes the columns of the
    matrix with all L rows exactly unit. v is padded with zeros to L entries, so that the first d columns are the same
    for every dimension.

    Only the first m entries of the padded v may differ from zero, m the next power of two from d. Then H v is H_m v
    repeated L/m times, and the first transform takes O(m log m).

    Args:
        size: P.
        dimension: d ≤ P.
        generator: Of B, G and Π.
        like: A tensor of the type and on the device that products are to have.
    """

    def __init__(self, size: int, dimension: int, generator: torch.Generator, like: Tensor):
        self.size, self.dimension = size, dimension
        whole, self._short = _power_of_two(size), _power_of_two(dimension)
        signs = rademacher((whole,), generator, dtype=like.dtype)
        diagonal = gaussian((whole,), generator, dtype=torch.promote_types(like.dtype, torch.float32))
        order = torch.randperm(whole, generator=generator)
        scale = math.sqrt(whole) * float(diagonal.double().norm()) * math.sqrt(size / whole)
        self._signs = signs[:dimension].to(like.device)
        self._diagonal = (diagonal / scale).to(like)
        # (Π x)_j = x[order[j]]; of x that repeats every m entries only the remainder counts.
        self._order = (order % self._short).to(like.device, torch.int32)
        self._inverse = torch.argsort(order).to(like.device, torch.int32)

    def matvec(self, vector: Tensor) -> Tensor:
        """P v: (d,) → (P,)."""
        short = vector.new_zeros(self._short)
        short[: self.dimension] = self._signs * vector
        permuted = hadamard_transform(short).index_select(0, self._order)
        return hadamard_transform(permuted.mul_(self._diagonal))[: self.size]

    def rmatvec(self, vector: Tensor) -> Tensor:
        """Pᵀ g: (P,) → (d,)."""
        padded = torch.nn.functional.pad(vector, (0, len(self._diagonal) - self.size))
        permuted = hadamard_transform(padded).mul_(self._diagonal).index_select(0, self._inverse)
        return hadamard_transform(permuted.view(-1, self._short).sum(0))[: self.dimension] * self._signs


def _power_of_two(size: int) -> int:
    """The smallest power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()


@lru_cache(maxsize=32)
def _hadamard(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(hadamard(size), dtype=dtype, device=device)
