"""The trace, by any of four methods: one front, each method in a file of its own."""

from typing import Literal, get_args

import torch
from torch import Tensor

from losslab.operators.base import LinearOperator
from losslab.solvers.budget import Budget
from losslab.solvers.deflated import krylov_trace
from losslab.solvers.estimate import Estimate
from losslab.solvers.estimator import Estimator, check, run
from losslab.solvers.hutch_pp import HutchPP
from losslab.solvers.hutchinson import Hutchinson
from losslab.solvers.xtrace import XTrace
from losslab.status import Progress

Method = Literal["krylov", "hutchinson", "hutch++", "xtrace"]

_ESTIMATORS: dict[str, type[Estimator[Estimate]]] = {
    "hutchinson": Hutchinson,
    "hutch++": HutchPP,
    "xtrace": XTrace,
}


def trace(
    operator: LinearOperator,
    *,
    method: Method = "krylov",
    tol: float = 0.01,
    max_matvecs: int = 96,
    time_budget: float | None = None,
    seed: int | torch.Generator = 0,
    vectors: Tensor | None = None,
    progress: Progress | None = None,
) -> Estimate:
    """What is the sum of the eigenvalues?  tr A, sampled: all methods but the first are without bias.

    | method | for m products | memory, in vectors |
    | --- | --- | --- |
    | krylov | a Krylov space of m/2 vectors, on which the trace is exact, and m/2 signs outside it | m/2 + 8 |
    | hutchinson | zᵀAz for m vectors of signs z (Hutchinson 1990) | 8 |
    | hutch++ | a basis of A's image of m/3 vectors, and m/3 signs outside it (Meyer et al. 2021) | m |
    | xtrace | each of m/2 vectors outside the image of the others (Epperly, Tropp & Webber 2024) | m |

    Where few eigenvalues hold most of ‖A‖_F, as at trained networks, hutchinson is by far the worst, and krylov the
    best: it pays one product for a basis vector where hutch++ and xtrace pay two. Where all eigenvalues are of one size
    there is nothing to deflate, and hutchinson is the best. krylov spends half of its budget before its first sample;
    the others stop as soon as `tol` allows, growing by blocks of eight samples with all products reused.

    Args:
        operator: Symmetric n×n.
        method: One of the above.
        tol: Stop once the standard error is below tol·|trace|.
        max_matvecs: Products at most, 16 or more.
        time_budget: Seconds at most; looked at after each product of krylov's first half, else after each block of 8
            samples (8, 24 or 16 products with hutchinson, hutch++ and xtrace).
        seed: Of the vectors; or a generator.
        vectors: (s, n) test vectors of one's own, all of which are used, and nothing else: signs, for hutch++ an even
            number, the first half for the basis; for xtrace vectors without a preferred direction. Not for krylov.
        progress: Called after each block of products.

    Returns:
        Estimate with its standard error, `breakdown` and exact where the basis is the whole space, `budget_reached` if
        the error is above tol·|trace|. NaN if the time was over before krylov took a sample.

    Raises:
        ValueError: method or tol out of range, max_matvecs below 16, vectors of another shape.
        MemoryError: A basis larger than the free memory.
    """
    if method not in get_args(Method):
        raise ValueError(f"method: expected one of {', '.join(get_args(Method))}; got {method!r}")
    if method != "krylov":
        return run(_ESTIMATORS[method], operator, tol, max_matvecs, time_budget, seed, vectors, progress)
    check(operator, tol, max_matvecs)
    if vectors is not None:
        raise ValueError("vectors: expected None with method='krylov', got a tensor; use method='hutchinson'")
    budget = Budget(max_matvecs, time_budget, progress, ranks=operator.split.ranks)
    return krylov_trace(operator, tol, budget, seed)
