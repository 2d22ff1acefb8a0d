"""An operator that is not symmetric is refused by everything that relies on it."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cases import CASES
from losslab.operators.base import LinearOperator
from losslab.operators.gradient_covariance import GradientCovariance
from losslab.operators.hessian import Hessian
from losslab.operators.risk import EmpiricalRisk
from losslab.operators.symmetry import require_symmetric
from losslab.solvers.block_krylov import BlockKrylov
from losslab.solvers.conjugate_gradients import conjugate_gradients
from losslab.solvers.density import spectral_density
from losslab.solvers.lanczos import eigenpairs
from losslab.solvers.trace import trace
from matrices import Broken, Counted, diagonal, rotated


class Plain(LinearOperator):
    """Any square matrix, unchecked."""

    def __init__(self, matrix: Tensor):
        self.matrix, self.size, self.dtype, self.device = matrix, len(matrix), matrix.dtype, matrix.device

    def _matmat(self, matrix: Tensor) -> Tensor:
        return self.matrix @ matrix


class Noisy(LinearOperator):
    """Another matrix at each product, as with dropout."""

    def __init__(self, size: int):
        self.size, self.dtype, self.device = size, torch.float64, torch.device("cpu")
        self.generator = torch.Generator().manual_seed(0)

    def _matmat(self, matrix: Tensor) -> Tensor:
        scale = 1 + 0.1 * torch.randn(matrix.shape, dtype=torch.float64, generator=self.generator)
        return matrix * scale


def skewed(n: int = 60, amount: float = 1e-2, dtype: torch.dtype = torch.float64) -> Plain:
    """A symmetric matrix with one entry changed, by `amount` of ‖A‖."""
    matrix = rotated(np.linspace(0.5, 2, n)).matrix.clone()
    matrix[0, -1] += 2 * amount
    return Plain(matrix.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, 300])
def test_symmetric_matrices_pass(n, dtype):
    for seed in range(20):
        require_symmetric(rotated(np.random.default_rng(seed).normal(size=n), dtype, seed), seed)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_scale_does_not_matter(scale):
    require_symmetric(rotated(scale * np.linspace(-1, 1, 40)))
    with pytest.raises(ValueError, match="operator: expected a symmetric one"):
        require_symmetric(scale * skewed())


@pytest.mark.parametrize(("dtype", "amount"), [(torch.float64, 1e-9), (torch.float32, 1e-2), (torch.float64, 1.0)])
def test_a_single_entry_is_seen(dtype, amount):
    for seed in range(10):
        with pytest.raises(ValueError, match="operator: expected a symmetric one"):
            require_symmetric(skewed(60, amount, dtype), seed)


def test_costs_two_products():
    operator = Counted(diagonal(np.arange(9.0)))
    require_symmetric(operator)
    assert operator.count == 2


@pytest.mark.parametrize("make", [Hessian, GradientCovariance])
@pytest.mark.parametrize("name", CASES)
def test_operators_of_networks_pass(name, make):
    require_symmetric(make(CASES[name]().risk()))


def test_a_hessian_in_float32_passes():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(128, 5)]
        batches = [(torch.randn(16, 1, 8, 8), torch.randint(5, (16,))) for _ in range(3)]
    hessian = Hessian(EmpiricalRisk(nn.Sequential(*layers), nn.CrossEntropyLoss(), batches))
    for seed in range(20):
        require_symmetric(hessian, seed)


@pytest.mark.parametrize("block_size", [1, 3])
@pytest.mark.parametrize("operator", [lambda: skewed(60, 0.05), lambda: Noisy(40)], ids=["skewed", "noisy"])
def test_eigenpairs_refuse_it_for_nothing(operator, block_size):
    with pytest.raises(ValueError, match="operator: expected a symmetric one"):
        eigenpairs(operator(), 3, tol=1e-9, block_size=block_size)


def test_within_a_block_and_between_blocks():
    with pytest.raises(ValueError, match="operator: expected a symmetric one"):
        eigenpairs(skewed(4, 0.5), 1, block_size=4)  # the first block is all there is
    shear = torch.zeros(4, 4, dtype=torch.float64)  # e₀ ↦ e₂ ↦ e₀/2: qᵢᵀAqⱼ = 0 within each block
    shear[2, 0] = shear[3, 1] = 1.0
    shear[0, 2] = shear[1, 3] = 0.5
    space = BlockKrylov(Plain(shear), torch.eye(4)[:2], 4)
    space.step()
    with pytest.raises(ValueError, match="operator: expected a symmetric one"):
        space.step()


@pytest.mark.parametrize("solve", [spectral_density, trace], ids=["spectral_density", "trace"])
def test_so_do_the_other_solvers_on_a_krylov_space(solve):
    with pytest.raises(ValueError, match="operator: expected a symmetric one"):
        solve(skewed(60, 0.05))


def test_conjugate_gradients_refuse_it():
    with pytest.raises(ValueError, match="operator: expected a symmetric one"):
        conjugate_gradients(skewed(), torch.ones(60))
    assert conjugate_gradients(skewed(60, 1e-12), torch.ones(60), check=False).status.ok


def test_nan_says_nothing_about_symmetry():
    require_symmetric(Broken(20, good=0))
