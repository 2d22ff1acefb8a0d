"""gradient_noise against the explicit covariance of the examples' gradients, and against closed forms."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from cases import classes, mlp, normal, paired, seeded
from losslab.operators import example_gradients
from losslab.operators.gradient_covariance import GradientCovariance
from losslab.operators.risk import EmpiricalRisk
from losslab.probes.gradient_moments import GradientMoments, gradient_moments
from losslab.probes.noise import gradient_noise
from losslab.probes.noise_scale import NoiseScale, noise_scale, two_batch
from losslab.report import matplotlib_backend
from losslab.report.charts.noise import noise as figure
from losslab.report.contents import read
from losslab.status import Status, StopRequested
from processes import run_ranks
from report_folders import start_run


def gradients(case) -> torch.Tensor:
    """(N, P), one backward pass an example."""
    rows = []
    for x, y in case.batches:
        for i in range(len(x)):
            rows.append(EmpiricalRisk(case.model, case.loss_fn, [(x[i : i + 1], y[i : i + 1])]).gradient())
    return torch.stack(rows)


def explicit(case) -> tuple[float, float]:
    """λ_max of C and of H as matrices."""
    covariance = torch.cov(gradients(case).mT, correction=0)
    hessian = case.reference_hessian(case.risk())
    return tuple(float(torch.linalg.eigvalsh(m)[-1]) for m in (covariance, hessian))


@pytest.mark.parametrize("sizes", [[3, 4], [7], [1] * 7])
def test_against_explicit_matrices(sizes):
    case = paired(mlp(), nn.CrossEntropyLoss(), normal(7, 4), classes(7), sizes)
    top_c, top_h = explicit(case)
    result = gradient_noise(case.risk(), tol=1e-4)
    assert abs(result.covariance_top - top_c) <= result.covariance_error <= 2e-4 * top_c
    assert abs(result.hessian_top - top_h) <= result.hessian_error <= 2e-4 * top_h
    assert result.ratio == pytest.approx(top_c / top_h, rel=1e-3)
    assert result.ratio == result.covariance_top / result.hessian_top
    assert abs(result.ratio - top_c / top_h) <= result.ratio_error <= 5e-4 * result.ratio
    assert (result.num_examples, result.status) == (7, Status.converged)


def test_linear_regression_in_closed_form():
    """gᵢ = 2rᵢxᵢ with residuals rᵢ, H = (2/N)XᵀX."""
    x, y = normal(12, 3), normal(12, 1, seed=2)
    case = paired(seeded(lambda: nn.Linear(3, 1, bias=False)), nn.MSELoss(), x, y, [5, 7])
    residual = (functional_call(case.model, {}, (x,)) - y).detach()
    covariance = torch.cov((2 * residual * x).mT, correction=0)
    result = gradient_noise(case.risk())
    assert result.covariance_top == pytest.approx(float(torch.linalg.eigvalsh(covariance)[-1]), rel=1e-12)
    assert result.hessian_top == pytest.approx(float(torch.linalg.eigvalsh(2 / 12 * x.mT @ x)[-1]), rel=1e-12)
    assert result.matvecs == 6  # two Krylov spaces of dimension 3: both exact


def test_no_noise_where_every_example_is_fitted():
    x = normal(6, 2)
    model = seeded(lambda: nn.Linear(2, 1, bias=False))
    case = paired(model, nn.MSELoss(), x, model.double()(x).detach(), [6])
    result = gradient_noise(case.risk())
    assert result.covariance_top == pytest.approx(0, abs=1e-20)
    assert result.ratio == pytest.approx(0, abs=1e-20)
    assert result.status.ok


def test_same_gradient_for_every_example_is_no_noise():
    """The covariance is centred: a common gradient is signal."""
    x, y = torch.ones(4, 2, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64)
    case = paired(seeded(lambda: nn.Linear(2, 1, bias=False)), nn.MSELoss(), x, y, [2, 2])
    assert float(case.risk().gradient().norm()) > 0.1
    result = gradient_noise(case.risk())
    assert result.covariance_top == pytest.approx(0, abs=1e-14)


def test_flat_loss_has_no_ratio():
    model = seeded(lambda: nn.Linear(2, 1, bias=False))
    case = paired(model, lambda output, target: output.mean(), normal(5, 2), normal(5, 1), [5])
    result = gradient_noise(case.risk())
    assert (result.hessian_top, result.ratio) == (0.0, math.inf)
    assert result.covariance_top > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_example_has_no_scatter(dtype):
    risk = EmpiricalRisk(mlp().to(dtype), nn.CrossEntropyLoss(), [(normal(1, 4).to(dtype), classes(1))])
    result = gradient_noise(risk)
    assert (result.covariance_top, result.ratio, result.status.ok) == (0.0, 0.0, True)
    assert math.isnan(result.alignment)


def test_neither_noise_nor_curvature_says_nothing():
    model = seeded(lambda: nn.Linear(2, 1, bias=False)).double()
    ones = torch.ones(3, 2, dtype=torch.float64)
    result = gradient_noise(EmpiricalRisk(model, lambda output, _: output.mean(), [(ones, ones)]))
    assert all(math.isnan(x) for x in (result.ratio, result.alignment, result.overlap))


def test_nonfinite_second_derivative_is_reported():
    """|w|^1.5 has the gradient 0 at 0, and no second derivative."""

    class Cusp(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3, dtype=torch.float64))

        def forward(self, x):
            return x * (self.w.abs() ** 1.5).sum()

    risk = EmpiricalRisk(Cusp(), lambda output, _: output.mean(), [(torch.ones(2, 1).double(), torch.zeros(2))])
    result = gradient_noise(risk)
    assert result.status is Status.nonfinite
    assert math.isnan(result.ratio)
    assert math.isinf(result.hessian_error)


def test_loss_that_mixes_examples_is_refused():
    case = paired(mlp(), lambda output, target: output.std() + output.mean(), normal(6, 4), normal(6, 3), [6])
    with pytest.raises(ValueError, match="mean of its examples' losses"):
        gradient_noise(case.risk())


def test_never_makes_the_matrix(monkeypatch):
    """Through products only: as many as it says."""
    count, original = 0, GradientCovariance._matmat

    def counted(self, matrix):
        nonlocal count
        count += matrix.shape[1]
        return original(self, matrix)

    monkeypatch.setattr(GradientCovariance, "_matmat", counted)
    result = gradient_noise(paired(mlp(), nn.CrossEntropyLoss(), normal(7, 4), classes(7), [3, 4]).risk())
    assert 0 < count < result.matvecs < 43


def problem(sizes=(5, 6, 9)):
    n = sum(sizes)
    return paired(mlp(), nn.CrossEntropyLoss(), normal(n, 4), classes(n), list(sizes))


@pytest.mark.parametrize("sizes", [(5, 6, 9), (20,)])
def test_trace_and_its_parts_are_exact(sizes):
    case = problem(sizes)
    rows, result = gradients(case), gradient_noise(case.risk(), tol=1e-2)
    assert result.covariance_trace == pytest.approx(float(torch.cov(rows.mT, correction=0).trace()), rel=1e-12)
    assert result.gradient_square == pytest.approx(float(rows.mean(dim=0).norm() ** 2), rel=1e-12)
    assert result.noise_scale_here == pytest.approx(result.covariance_trace / result.gradient_square, rel=1e-15)
    assert result.tensors == ("0.weight", "0.bias", "2.weight", "2.bias")
    for number, part in enumerate(rows.split([20, 5, 15, 3], dim=1)):
        signal = float(part.mean(dim=0).norm() ** 2)
        scatter = float((part - part.mean(dim=0)).square().sum() / len(part))
        assert result.tensor_signal[number] == pytest.approx(signal, rel=1e-12)
        assert result.tensor_noise[number] == pytest.approx(scatter, rel=1e-12)
        assert result.tensor_signal_to_noise[number] == pytest.approx(signal / scatter, rel=1e-12)


def test_chosen_parameters_only():
    case = problem()
    whole, part = gradient_noise(case.risk(), tol=1e-2), gradient_noise(case.risk(params="2.*"), tol=1e-2)
    assert part.tensors == ("2.weight", "2.bias")
    np.testing.assert_allclose(part.tensor_noise, whole.tensor_noise[2:], rtol=1e-12)
    assert part.covariance_trace == pytest.approx(whole.tensor_noise[2:].sum(), rel=1e-12)


def test_a_sum_over_examples_has_the_same_noise():
    case = problem()
    case.loss_fn = nn.CrossEntropyLoss(reduction="sum")
    result = gradient_noise(case.risk(), tol=1e-2)
    assert result.covariance_trace == pytest.approx(gradient_noise(problem().risk(), tol=1e-2).covariance_trace)


@pytest.mark.parametrize("k", [1, 3])
def test_angles_between_the_top_eigenvectors(k):
    case = problem()
    top_c, top_h = (
        torch.linalg.eigh(matrix).eigenvectors.flip(1)[:, :k]
        for matrix in (torch.cov(gradients(case).mT, correction=0), case.reference_hessian(case.risk()))
    )
    result = gradient_noise(case.risk(), k=k, tol=1e-8)
    assert result.alignment == pytest.approx(float((top_c[:, 0] @ top_h[:, 0]).abs()), abs=1e-6)
    assert result.overlap == pytest.approx(float((top_c.mT @ top_h).square().sum() / k), abs=1e-6)


POINTS = torch.tensor([[2.0, 0.0, 1.0], [-1.0, 1.0, 1.5], [0.5, -3.0, 0.0]], dtype=torch.float64)
MEAN = POINTS.mean(dim=0)
SIGNAL, TRACE = float(MEAN.square().sum()), float((POINTS - MEAN).square().sum() / 3)


@pytest.mark.parametrize(("b", "size"), [(1, 2), (1, 4), (3, 4)])
def test_two_batch_is_unbiased(b, size):
    """Over all samples of `size` draws from three gradients, of which the first b are the small batch."""
    samples = POINTS[torch.tensor(list(itertools.product(range(3), repeat=size)))]
    small, large = samples[:, :b].mean(dim=1).square().sum(dim=1), samples.mean(dim=1).square().sum(dim=1)
    pairs = [two_batch(float(s), b, float(m), size) for s, m in zip(small, large, strict=True)]
    np.testing.assert_allclose(np.mean(pairs, axis=0), [SIGNAL, TRACE], rtol=1e-12)


def moments(rows: torch.Tensor, num_groups: int) -> GradientMoments:
    labels = torch.arange(len(rows)) % num_groups
    units = torch.eye(num_groups, dtype=torch.float64)[labels]
    squares = rows.square().sum(dim=1)
    return GradientMoments(units.sum(dim=0), units.mT @ squares, units.mT @ rows, squares, squares)


def test_noise_scale_is_unbiased_whatever_the_groups():
    samples = POINTS[torch.tensor(list(itertools.product(range(3), repeat=4)))]
    found = [noise_scale(moments(rows, groups)) for rows in samples for groups in (2, 4)]
    np.testing.assert_allclose(
        np.mean([[scale.signal, scale.trace] for scale in found], axis=0), [SIGNAL, TRACE], rtol=1e-12
    )


def test_errors_are_the_scatter_over_samples():
    """500 samples of 96 gradients: means within four standard errors, errors the size of the scatter."""
    generator = torch.Generator().manual_seed(0)
    mean, width = torch.tensor([1.0, -0.5, 0.2]).double(), torch.tensor([1.0, 2.0, 0.5]).double()
    rows = mean + width * torch.randn(500, 96, 3, generator=generator, dtype=torch.float64)
    found = [noise_scale(moments(each, 16)) for each in rows]
    for value, error, exact in (("signal", "signal_error", 1.29), ("trace", "trace_error", 5.25)):
        values, errors = (np.array([getattr(scale, name) for scale in found]) for name in (value, error))
        assert abs(values.mean() - exact) < 4 * values.std() / math.sqrt(500)
        assert np.sqrt((errors**2).mean()) == pytest.approx(values.std(), rel=0.15)
    ratios, errors = (np.array([getattr(scale, name) for scale in found]) for name in ("value", "standard_error"))
    assert np.median(ratios) == pytest.approx(5.25 / 1.29, rel=0.1)
    within = np.abs(ratios - 5.25 / 1.29) < 2 * errors
    assert 0.85 < within.mean() < 0.99


def test_no_signal_is_an_infinite_noise_scale():
    rows = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64)
    found = noise_scale(moments(rows, 4))
    assert (found.value, found.standard_error) == (math.inf, math.inf)
    assert found.signal == pytest.approx(-1 / 3)
    assert found.trace == pytest.approx(4 / 3)
    few = noise_scale(moments(rows[:2], 2))
    assert math.isnan(few.signal_error)
    assert few.trace == pytest.approx(2.0)
    assert math.isnan(noise_scale(moments(rows[:1], 1)).trace)


def test_noise_scale_of_a_network():
    case = problem((20, 20, 20))
    rows, result = gradients(case), gradient_noise(case.risk(), tol=1e-2)
    unbiased = float(torch.cov(rows.mT, correction=1).trace())
    signal = float(rows.mean(dim=0).norm() ** 2) - unbiased / 60
    assert result.noise_scale.trace == pytest.approx(unbiased, rel=1e-12)
    assert result.noise_scale.signal == pytest.approx(signal, rel=1e-9)
    assert result.noise_scale.value == pytest.approx(unbiased / signal, rel=1e-9)
    # By the examples' own scatter: what 16 random groups estimate to a fifth or so.
    scatter = float((rows - rows.mean(dim=0)).square().sum(dim=1).std()) / math.sqrt(60)
    assert scatter / 2 < result.noise_scale.trace_error < 2 * scatter


def test_groups_are_random_and_do_not_depend_on_the_batches():
    parts = [gradient_moments(problem(sizes).risk(), 4, seed=0) for sizes in ((5, 6, 9), (20,))]
    torch.testing.assert_close(parts[0].sums, parts[1].sums)
    assert parts[0].counts.tolist() == [5, 5, 5, 5]
    other = gradient_moments(problem().risk(), 4, seed=1)
    assert not torch.allclose(other.sums, parts[0].sums)
    torch.testing.assert_close(other.sums.sum(dim=0), parts[0].sums.sum(dim=0))


def test_stopped_at_once_has_no_moments():
    def stop(done, total, note):
        raise StopRequested

    result = gradient_noise(problem().risk(), progress=stop)
    assert result.status is Status.stopped
    assert math.isnan(result.covariance_trace)
    assert isinstance(result.noise_scale, NoiseScale)
    assert math.isnan(result.noise_scale.trace)
    assert result.matvecs == 2


def shared(ranks) -> tuple[float, ...]:
    case = problem()
    batches = [case.batches[:2], case.batches[2:]][ranks.rank]
    result = gradient_noise(EmpiricalRisk(case.model, case.loss_fn, batches, ranks=ranks), tol=1e-8)
    scale = result.noise_scale
    return result.covariance_trace, result.alignment, scale.trace, scale.signal, float(result.tensor_noise[1])


@pytest.mark.slow
def test_several_processes(tmp_path):
    whole = gradient_noise(problem().risk(), tol=1e-8)
    scale = whole.noise_scale
    expected = whole.covariance_trace, whole.alignment, scale.trace, scale.signal, float(whole.tensor_noise[1])
    for found in run_ranks(shared, 2, tmp_path):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_figure_shows_both_tops_and_each_tensor(tmp_path):
    result = gradient_noise(problem().risk(), tol=1e-2)
    start_run(tmp_path / "a").write_probe("noise", "1", *result.to_record())
    (chart,) = figure(read(tmp_path), {"a": "#000000"})
    tops, tensors = chart.panels
    assert tops.series[0].y.tolist() == [result.hessian_top, result.covariance_top]
    assert tensors.series[0].x.tolist() == list(result.tensors)
    np.testing.assert_array_equal(tensors.series[0].y, result.tensor_signal_to_noise)
    np.testing.assert_allclose(tensors.series[1].y, 1 / 20)
    matplotlib_backend.save(chart, tmp_path / "picture.png")


def test_errors_are_the_jackknife_over_groups():
    rows = torch.randn(24, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 1
    groups, found = 6, noise_scale(moments(rows, 6))
    labels = torch.arange(24) % groups
    left = [noise_scale(moments(rows[labels != g], groups - 1)) for g in range(groups)]
    for name in ("trace", "signal"):
        values = np.array([getattr(scale, name) for scale in left])
        expected = math.sqrt((groups - 1) / groups * ((values - values.mean()) ** 2).sum())  # Efron & Stein 1981
        assert getattr(found, f"{name}_error") == pytest.approx(expected, rel=1e-9)


def test_moments_do_not_depend_on_the_chunks(monkeypatch):
    """Two examples at a time, and one over, are the whole batch at once: also which group each example is in."""
    case = paired(mlp(), nn.CrossEntropyLoss(), normal(12, 4), classes(12), [7, 5])
    whole = gradient_moments(case.risk(), num_groups=4, seed=3)
    monkeypatch.setattr(example_gradients, "_CHUNK_BYTES", 2 * case.risk().space.size * 8)
    parts = gradient_moments(case.risk(), num_groups=4, seed=3)
    for name in ("counts", "squares", "sums"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))
