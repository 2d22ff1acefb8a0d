"""What holds for every matrix and every small network, tried on many that nobody chose."""

import dataclasses

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from losslab.operators.base import LinearOperator
from losslab.operators.gradient_covariance import GradientCovariance
from losslab.operators.hessian import Hessian
from losslab.operators.risk import EmpiricalRisk
from losslab.solvers.conjugate_gradients import conjugate_gradients
from losslab.solvers.density import spectral_density
from losslab.solvers.lanczos import Which, eigenpairs
from losslab.solvers.power import power_iteration
from losslab.solvers.trace import trace
from matrices import diagonal, rotated

settings.register_profile("losslab", derandomize=True, deadline=None, database=None)
settings.load_profile("losslab")
tried = settings(max_examples=40)
tried_on_networks = settings(max_examples=20)
FACTORS = st.floats(-4, 4).map(lambda x: round(x, 4))
KINDS: list[Which] = ["largest_magnitude", "largest", "smallest", "both_ends"]


@dataclasses.dataclass
class Problem:
    """A small network in float64 with its data, batches of unequal size among them."""

    model: nn.Sequential
    loss_fn: nn.Module
    batches: list[tuple[Tensor, Tensor]]

    def risk(self, params: str | None = None, graph_memory: int = 1 << 20) -> EmpiricalRisk:
        options = {"params": params, "graph_memory": graph_memory, "check": False}
        return EmpiricalRisk(self.model, self.loss_fn, self.batches, **options)

    @property
    def parts(self) -> list[tuple[str, slice]]:
        """Each layer's pattern, and its place in the vector."""
        sizes = [(name, sum(p.numel() for p in layer.parameters())) for name, layer in self.model.named_children()]
        ends = np.cumsum([size for _, size in sizes])
        return [(f"{n}.*", slice(e - size, e)) for (n, size), e in zip(sizes, ends, strict=True) if size]


@st.composite
def problems(draw) -> Problem:
    inputs, hidden, outputs = (draw(st.integers(low, 4)) for low in (1, 1, 2))
    activation = draw(st.sampled_from([nn.Tanh, nn.Softplus, nn.GELU, nn.Sigmoid]))
    reduction = draw(st.sampled_from(["mean", "sum"]))
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    classes = draw(st.booleans())
    with torch.random.fork_rng([]):
        torch.manual_seed(draw(st.integers(0, 10_000)))
        layers = [nn.Linear(inputs, hidden, bias=draw(st.booleans())), activation()]
        model = nn.Sequential(*layers, nn.Linear(hidden, outputs)).double()
        x = [torch.randn(size, inputs, dtype=torch.float64) for size in sizes]
        y = [torch.randint(outputs, (len(a),)) if classes else torch.randn(len(a), outputs).double() for a in x]
    loss_fn = nn.CrossEntropyLoss(reduction=reduction) if classes else nn.MSELoss(reduction=reduction)
    return Problem(model, loss_fn, list(zip(x, y, strict=True)))


@st.composite
def simple_spectra(draw) -> np.ndarray:
    """Eigenvalues of either sign over some decades, each of them once."""
    values = draw(st.lists(st.floats(-3, 3).map(lambda x: round(x, 2)), min_size=2, max_size=30, unique=True))
    return np.sign(values) * np.abs(values) ** draw(st.sampled_from([1, 3]))


@st.composite
def spectra(draw) -> np.ndarray:
    """Also with copies, and a null space."""
    values = np.repeat(draw(simple_spectra()), draw(st.integers(1, 3)))[:30]
    return np.append(values, np.zeros(draw(st.integers(0, 3))))


def vectors(size: int, seed: int, count: int = 2) -> Tensor:
    return torch.randn(size, count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(got: object, expected: object, scale: float, tolerance: float = 1e-9) -> None:
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected), rtol=0, atol=tolerance * max(scale, 1e-12))


def every_eigenvalue(operator: LinearOperator) -> np.ndarray:
    return np.linalg.eigvalsh(operator.to_dense().numpy())


@tried_on_networks
@given(problems(), st.integers(0, 1000), st.sampled_from([Hessian, GradientCovariance]), st.sampled_from([0, 1 << 20]))
def test_operators_are_symmetric_and_linear(problem, seed, kind, graph_memory):
    operator = kind(problem.risk(graph_memory=graph_memory))
    dense = operator.to_dense()
    scale = 1 + float(dense.norm())  # the covariance is a difference of numbers about 1
    close(dense, dense.mT, scale)
    u, v = vectors(operator.size, seed).unbind(1)
    close(operator @ (2 * u - 3 * v), 2 * (operator @ u) - 3 * (operator @ v), scale * float(u.norm() + v.norm()))
    close(u @ (operator @ v), v @ (operator @ u), scale * float(u.norm() * v.norm()))
    close(operator.matmat(torch.stack([u, v], 1)), dense @ torch.stack([u, v], 1), scale * float(u.norm() + v.norm()))


@tried_on_networks
@given(problems())
def test_covariance_is_positive_semidefinite(problem):
    values = every_eigenvalue(GradientCovariance(problem.risk()))
    assert values.min() >= -1e-12 * (1 + values.max())


@tried_on_networks
@given(problems())
def test_trace_is_the_sum_of_the_eigenvalues(problem):
    hessian = Hessian(problem.risk())
    values = every_eigenvalue(hessian)
    estimate = trace(hessian, max_matvecs=2 * hessian.size + 16, tol=1e-9)
    close(estimate.value, values.sum(), float(np.abs(values).sum()), 1e-8)
    assert estimate.standard_error == 0


@tried_on_networks
@given(problems(), st.integers(0, 3))
def test_chosen_parameters_are_a_block(problem, choice):
    whole = Hessian(problem.risk()).to_dense()
    pattern, place = problem.parts[choice % len(problem.parts)]
    close(Hessian(problem.risk(pattern)).to_dense(), whole[place, place], float(whole.norm()))


@tried
@given(simple_spectra(), st.integers(0, 1000), st.sampled_from(["largest", "smallest"]), st.integers(1, 4))
def test_copies_are_found_up_to_the_block_size(values, seed, which, copies):
    values = np.sort(np.repeat(values, copies))
    k, scale = min(len(values), 5), float(np.abs(values).max())
    result = eigenpairs(rotated(values, seed=seed), k, which=which, tol=1e-10, block_size=copies, seed=seed)
    close(result.values, values[::-1][:k] if which == "largest" else values[:k], scale)
    assert result.status.ok


@tried
@given(simple_spectra(), st.integers(0, 1000), st.sampled_from(KINDS), st.integers(1, 3), st.integers(2, 6))
def test_block_size_does_not_change_eigenvalues(values, seed, which, k, block_size):
    ends = 2 if which == "both_ends" else 1
    k, block_size, operator = min(k, len(values) // ends), min(block_size, len(values)), rotated(values, seed=seed)
    single, block = (eigenpairs(operator, k, which=which, tol=1e-10, block_size=b, seed=seed) for b in (1, block_size))
    assert single.status.ok
    assert block.status.ok
    magnitudes = (np.abs(x.values) if which == "largest_magnitude" else x.values for x in (single, block))
    close(*magnitudes, float(np.abs(values).max()))


@tried
@given(simple_spectra(), st.integers(0, 1000), FACTORS, FACTORS, st.sampled_from(["largest", "smallest"]))
def test_shift_and_scale_of_the_spectrum(values, seed, shift, factor, which):
    """cA + sI has the eigenvalues cλ + s; a negative c turns the ends around."""
    operator, k = rotated(values, seed=seed), min(2, len(values))
    moved = factor * operator + diagonal(np.full(len(values), shift))
    opposite = {"largest": "smallest", "smallest": "largest"}[which] if factor < 0 else which
    plain, got = eigenpairs(operator, k, which=opposite, tol=1e-10), eigenpairs(moved, k, which=which, tol=1e-10)
    scale = abs(shift) + abs(factor) * float(np.abs(values).max())
    close(got.values, factor * plain.values + shift, scale, 1e-8)
    total = factor * values.sum() + shift * len(values)
    close(trace(moved, tol=1e-9, max_matvecs=200).value, total, scale * len(values))


@tried
@given(spectra(), st.integers(0, 1000), st.integers(1, 30))
def test_bounds_hold_whenever_it_stops(values, seed, budget):
    """However small the budget, an eigenvalue is within the stated error of every value."""
    operator = rotated(values, seed=seed)
    exact, scale = np.sort(values), float(np.abs(values).max())
    pairs = eigenpairs(operator, 1, max_matvecs=budget, seed=seed, tol=1e-10)
    power = power_iteration(operator, max_matvecs=budget, seed=seed, tol=1e-10)
    for value, error in [(pairs.values[0], pairs.errors[0]), (power.value, power.error)]:
        assert np.abs(exact - value).min() <= error + 1e-13 * scale
        assert exact[0] - 1e-12 * scale <= value <= exact[-1] + 1e-12 * scale


@tried
@given(spectra(), st.integers(0, 1000), st.floats(0.1, 3), st.integers(1, 3))
def test_solutions_solve(values, seed, margin, count):
    """Positive definite by a margin: the residual is what it says; not so: it is noticed, or no direction showed it."""
    operator, b = rotated(values, seed=seed), vectors(len(values), seed, count)
    result = conjugate_gradients(operator, b, shift=margin - values.min(), tol=1e-9, max_matvecs=1000)
    assert result.status.ok
    rest = b - operator @ result.x - (margin - values.min()) * result.x
    close(result.residuals, (rest.norm(dim=0) / b.norm(dim=0)).numpy(), 1.0, 1e-10)
    spread = values.max() - values.min()
    assert values.min() - 1e-9 <= result.curvature <= values.max() + 1e-9
    failing = conjugate_gradients(operator, b, shift=-values.min() - 0.5 * spread - 0.1, tol=1e-9, max_matvecs=1000)
    assert failing.status.name == "indefinite" or failing.curvature > values.min() + 0.5 * spread + 0.1


@tried
@given(spectra(), st.integers(0, 1000))
def test_moments_of_the_density(values, seed):
    """A Gauss quadrature with m nodes is exact for polynomials below degree 2m."""
    operator, m = rotated(values, seed=seed), 4
    density = spectral_density(operator, vectors=torch.eye(len(values)), num_nodes=m)
    scale = float(np.abs(values).max())
    for power in range(2 * m):
        close(density.weights @ density.nodes**power, (values**power).mean(), scale**power, 1e-10)
