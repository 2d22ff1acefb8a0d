"""The diagonal, by either of two methods: one front, each method in a file of its own."""

from typing import Literal, get_args

import torch
from torch import Tensor

from losslab.operators.base import LinearOperator
from losslab.solvers.estimate import DiagonalEstimate
from losslab.solvers.estimator import Estimator, run
from losslab.solvers.hutchinson import HutchinsonDiagonal
from losslab.solvers.xdiag import XDiag
from losslab.status import Progress

Method = Literal["hutchinson", "xdiag"]

_ESTIMATORS: dict[str, type[Estimator[DiagonalEstimate]]] = {"hutchinson": HutchinsonDiagonal, "xdiag": XDiag}


def diagonal(
    operator: LinearOperator,
    *,
    method: Method = "hutchinson",
    tol: float = 0.1,
    max_matvecs: int = 200,
    time_budget: float | None = None,
    seed: int | torch.Generator = 0,
    vectors: Tensor | None = None,
    progress: Progress | None = None,
) -> DiagonalEstimate:
    """What are the diagonal entries A_ii?  The curvature along each single parameter, sampled without bias.

    | method | for m products | memory, in vectors |
    | --- | --- | --- |
    | hutchinson | z ∘ Az for m vectors of signs z (Bekas, Kokiopoulou & Saad 2007) | 8 |
    | xdiag | each of m/2 vectors of signs outside A's image of the others (Epperly, Tropp & Webber 2024) | 1.5·m |

    hutchinson sees the off-diagonal entries as noise: it is exact from one product where A is diagonal, and errs by
    (Σ_i≠j A_ij²/m)^½ in all. xdiag takes A's large eigenvalues out of that noise, at twice the cost a sample: it is
    exact where the rank is below m/2, and better where few eigenvalues hold most of ‖A‖_F, as at trained networks.

    Args:
        operator: Symmetric n×n.
        method: One of the above.
        tol: Stop once ‖standard_error‖ ≤ tol·‖values‖.
        max_matvecs: Products at most, 16 or more.
        time_budget: Seconds at most; looked at after each block of 8 samples.
        seed: Of the vectors; or a generator.
        vectors: (s, n) signs of one's own, all of which are used, and nothing else.
        progress: Called after each block of products.

    Returns:
        DiagonalEstimate with the standard error of each entry; `budget_reached` if the errors are larger than asked
        for, `breakdown` and exact where xdiag's basis is the whole space.

    Raises:
        ValueError: method or tol out of range, max_matvecs below 16, vectors of another shape.
        MemoryError: A basis larger than the free memory.

    >>> from losslab.operators.dense import DenseOperator
    >>> diagonal(DenseOperator(torch.diag(torch.tensor([3.0, -1.0])))).values.tolist()
    [3.0, -1.0]
    """
    if method not in get_args(Method):
        raise ValueError(f"method: expected one of {', '.join(get_args(Method))}; got {method!r}")
    return run(_ESTIMATORS[method], operator, tol, max_matvecs, time_budget, seed, vectors, progress)
