"""Random estimates that improve with every block of test vectors, until they are good enough or the budget is spent."""

import dataclasses
from abc import ABC, abstractmethod
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from losslab.operators.base import LinearOperator, require_operator
from losslab.random import make_generator, rademacher
from losslab.solvers.budget import Budget
from losslab.solvers.estimate import DiagonalEstimate, Estimate
from losslab.solvers.krylov import basis_dtype, new_basis
from losslab.status import Progress, Status

BLOCK = 8  # test vectors that share a pass over the data where graphs are not kept
MIN_SAMPLES = 8  # fewer give no usable standard error

Result = TypeVar("Result", Estimate, DiagonalEstimate)


class Estimator(ABC, Generic[Result]):
    """A quantity of A seen through products with random test vectors.

    A subclass implements `add`. Vectors are rows; with several processes each keeps its part of every row, and they are
    drawn from one seed, so the same everywhere.
    """

    cost: ClassVar[int] = 1  # products for a sample
    vectors_per_sample: ClassVar[int] = 1

    def __init__(
        self, operator: LinearOperator, tol: float, budget: Budget, generator: torch.Generator, seed: int | None = None
    ):
        self.operator, self.tol, self.budget, self.generator, self.seed = operator, tol, budget, generator, seed
        self.split, self.dtype = operator.split, basis_dtype(operator)
        self.note = ""  # what is known so far, for `progress`

    @abstractmethod
    def add(self, vectors: Tensor) -> Result:
        """The estimate from all test vectors so far and these, (s, n); `budget_reached` until it is good enough."""

    def draw(self, num_samples: int) -> Tensor:
        """Test vectors for so many samples: independent signs unless overridden."""
        return rademacher((num_samples * self.vectors_per_sample, self.operator.size), self.generator)

    def refine(self) -> Result:
        """Draw and add blocks, at least one, until the result has converged or no further block may be made."""
        while True:
            num_samples = min(BLOCK, self.budget.left // self.cost)
            result = self.add(self.part(self.draw(num_samples)))
            self.note = str(result).partition(" (")[0]  # the number and its error
            early = result.status is Status.converged and result.num_samples < MIN_SAMPLES
            if result.status is not Status.budget_reached and not early:
                return result
            over = self.budget.stop()
            if over is None and self.budget.left < self.cost:
                over = Status.budget_reached
            if over is not None:
                return dataclasses.replace(result, status=over)

    def room(self, kinds: int) -> tuple[Tensor, ...]:
        """Memory for so many kinds of vectors, one of each kind for each sample, of which n are always enough.

        Raises:
            MemoryError: It is not free.
        """
        num_samples = min(self.budget.max_matvecs // self.cost, self.operator.size)
        return new_basis(self.operator, kinds * num_samples).chunk(kinds)

    def part(self, vectors: Tensor) -> Tensor:
        """This process's part of the rows, on the operator's device, in the dtype that sums are taken in."""
        return self.split.part(vectors.to(device=self.operator.device, dtype=self.dtype))

    def multiply(self, rows: Tensor) -> Tensor:
        """Av for each row v, counted; one pass over the data for each block."""
        products = []
        for block in rows.split(BLOCK):
            products.append(self.operator.matmat_part(block.mT).mT.to(self.dtype))
            self.budget.spend(len(block), self.note)
        return torch.cat(products)

    def dots(self, left: Tensor, right: Tensor) -> Tensor:
        """uᵀv for each pair of rows, in float64 on the host."""
        return self.split.sum((left.double() * right.double()).sum(dim=1)).cpu()


class Moments:
    """Mean and scatter of samples that come in blocks, entry by entry (Chan, Golub & LeVeque 1983)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor = torch.zeros(())
        self.squares: Tensor = torch.zeros(())  # Σ (x − mean)²

    def add(self, samples: Tensor) -> None:
        """Samples as rows."""
        count, mean = len(samples), samples.mean(dim=0)
        shift, total = mean - self.mean, self.count + len(samples)
        self.squares = self.squares + ((samples - mean) ** 2).sum(dim=0) + shift**2 * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total

    def standard_error(self) -> Tensor:
        """Of the mean: infinite from a single sample."""
        if self.count < 2:
            return torch.full_like(self.mean, torch.inf)
        return (self.squares / (self.count * (self.count - 1))).sqrt()


def run(
    kind: type[Estimator[Result]],
    operator: LinearOperator,
    tol: float,
    max_matvecs: int,
    time_budget: float | None,
    seed: int | torch.Generator,
    vectors: Tensor | None,
    progress: Progress | None,
) -> Result:
    """The estimate from random test vectors within a budget; or from all those given, and no others.

    Raises:
        ValueError: tol not above 0, max_matvecs below 16, vectors of another shape.
    """
    check(operator, tol, max_matvecs)
    generator, ranks = make_generator(seed), operator.split.ranks
    if vectors is None:
        budget = Budget(max_matvecs, time_budget, progress, ranks=ranks)
        return kind(operator, tol, budget, generator, seed if isinstance(seed, int) else None).refine()
    multiple = kind.vectors_per_sample
    if vectors.ndim != 2 or vectors.shape[1] != operator.size or not len(vectors) or len(vectors) % multiple:
        rows = "s" if multiple == 1 else f"{multiple}s"
        raise ValueError(f"vectors: expected shape ({rows}, {operator.size}), got {tuple(vectors.shape)}")
    budget = Budget(kind.cost * len(vectors) // multiple, None, progress, ranks=ranks)
    estimator = kind(operator, tol, budget, generator)
    return estimator.add(estimator.part(vectors))


def check(operator: LinearOperator, tol: float, max_matvecs: int) -> None:
    """Refuse what no estimator can work with."""
    require_operator(operator)
    if not tol > 0:
        raise ValueError(f"tol: expected a number > 0, got {tol!r}")
    if max_matvecs < 2 * MIN_SAMPLES:
        raise ValueError(f"max_matvecs: expected at least {2 * MIN_SAMPLES}, got {max_matvecs}")
