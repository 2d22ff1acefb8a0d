"""The curvature of each layer: by the diagonal blocks of the Hessian, or of all layers together by one product.

A product of H with the vectors of all layers at once has Σ_c H_bc v_c in the rows of layer b: the blocks beside the
diagonal are in it. Random signs of the v_c take them out on average only, with a variance as large as what they take
out; and one pass backwards for many vectors (`is_grads_batched`) does the work of as many. So the diagonal blocks cost
a product each. What one product does find, as it is repeated, is the v with Hv = Λv, Λ one number for each layer: the
multivariate eigenvalue problem (Horst 1961; Chu & Watterson 1993), by the power method of Journée et al. (2010).
"""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from losslab.optim.homotopy.batch_hessian import BatchHessian, Root
from losslab.optim.homotopy.curvature import COLD_PRODUCTS, Curvature
from losslab.random import gaussian, make_generator


def diagonal_blocks(hessian: BatchHessian, counts: Sequence[int], roots: Sequence[Root | None]) -> list[BatchHessian]:
    """The blocks H_bb of consecutive parameters, all on the one gradient graph that is there.

    Args:
        hessian: Of all of them, without a root.
        counts: Parameters of each block.
        roots: P^(−½) of each block.

    Cost: nothing. A product with a block goes backwards through what lies between that layer and the loss, and finds
    that layer's entries only: those of all B layers together cost less than B products with H.
    """
    found, first = [], 0
    for count, root in zip(counts, roots, strict=True):
        block, chosen = copy.copy(hessian), slice(first, first + count)
        block.parameters, block.gradients = hessian.parameters[chosen], hessian.gradients[chosen]
        block.size, block.root = sum(parameter.numel() for parameter in block.parameters), root
        found.append(block)
        first += count
    return found


class JointPower:
    """How curved is each layer, if all move at once?  ρ_b = ‖(Hv)_b‖ of the v with ‖v_b‖ = 1 and (Hv)_b = ρ_b v_b.

    With rates η_b = c/ρ_b the matrix diag(η)H has the eigenvalue c: what layers do to each other is counted, which
    blocks by themselves leave out (theirs may add up to B times as much). Where H is block-diagonal, ρ_b is ‖H_bb‖.

    Args:
        generator: Of the first v, and of parts of it that have vanished.

    Attributes:
        vector: v; None before the first.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.vector: Tensor | None = None
        self._generator = make_generator(0) if generator is None else generator

    def __call__(self, hessian: BatchHessian, blocks: Sequence[BatchHessian], products: int = 1) -> list[Curvature]:
        """One product from where the last call ended, ten in the first; a `Curvature` for each block, with ρ_b.

        Args:
            hessian: Of all blocks, with their roots.
            blocks: For their gradients' norms.
            products: Of a call that is not the first.

        Cost: `products` products with the whole H; memory one vector.
        """
        sizes = [block.size for block in blocks]
        v = self._start(hessian, sizes)
        products = products if self.vector is not None else max(products, COLD_PRODUCTS)
        lengths: list[float] = []
        for _ in range(products):
            image = hessian @ v
            lengths = [_length(part) for part in image.split(sizes)]
            if not all(map(math.isfinite, lengths)):
                break
            v = _units(image, sizes, otherwise=v)
        self.vector = v
        return [
            Curvature(hessian.loss, block.gradient_norm, length, products=products)
            for block, length in zip(blocks, lengths, strict=True)
        ]

    def _start(self, hessian: BatchHessian, sizes: Sequence[int]) -> Tensor:
        """The last v, or random numbers, of which each part has length 1."""
        if self.vector is not None and self.vector.shape != (hessian.size,):
            self.vector = None
        v = gaussian((hessian.size,), self._generator) if self.vector is None else self.vector
        v = v.to(hessian.device, hessian.dtype)
        if not all(0 < _length(part) < math.inf for part in v.split(list(sizes))):
            drawn = gaussian((hessian.size,), self._generator).to(v)
            return _units(v, sizes, otherwise=_units(drawn, sizes, otherwise=drawn))
        return _units(v, sizes, otherwise=v)

    def state_dict(self) -> dict[str, Tensor]:
        """The vector, and where the random numbers stand."""
        vector = {} if self.vector is None else {"vector": self.vector.clone()}
        return {"generator": self._generator.get_state(), **vector}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from `state_dict`."""
        self._generator.set_state(state["generator"].cpu())
        self.vector = state["vector"].clone() if "vector" in state else None


def _length(part: Tensor) -> float:
    return float(torch.linalg.vector_norm(part, dtype=torch.float64))


def _units(vector: Tensor, sizes: Sequence[int], *, otherwise: Tensor) -> Tensor:
    """Each part of length 1; what it is otherwise, where it has vanished or is not finite."""
    pairs = zip(vector.split(list(sizes)), otherwise.split(list(sizes)), strict=True)
    return torch.cat([part / size if 0 < (size := _length(part)) < math.inf else other for part, other in pairs])
