"""The phase that TALT's statistics tell, and the Hessian products along its way."""

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from losslab.optim.diagnostics import phase
from losslab.optim.eigenspace.options import TALTOptions
from losslab.optim.probe import step_curvature, valley_curvature
from losslab.optim.talt import TALT
from second_derivatives import Once
from untouched import assert_untouched


class Quadratic(nn.Module):
    """½wᵀHw of a matrix and a vector, w in one piece."""

    def __init__(self, H: Tensor):
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.matrix = nn.Parameter(torch.randn(3, 4, generator=draw, dtype=H.dtype))
        self.vector = nn.Parameter(torch.randn(5, generator=draw, dtype=H.dtype))
        self.H = H

    def forward(self, through: Callable[[Tensor], Tensor] = lambda w: 2 * w) -> Tensor:
        w = through(torch.cat([self.matrix.flatten(), self.vector]))
        return 0.125 * w @ self.H @ w


def symmetric(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    A = torch.randn(17, 17, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return A + A.T


def trained(model: Quadratic, steps: int = 30, **settings) -> TALT:
    """TALT after steps at noisy gradients that move nothing."""
    optimizer, draw = TALT(model.parameters(), 0.0, betas=(0.95, 0.95), **settings), torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = 100 * (1 + torch.randn(p.shape, generator=draw, dtype=p.dtype))
        optimizer.step()
    return optimizer


def way(optimizer: TALT, p: nn.Parameter, *, valleys: bool) -> Tensor:
    """M/√V in the eigenspace, written out."""
    state = optimizer.state[p]
    V = state["exp_avg_sq"] / (1 - 0.95 ** int(state["step"]))
    found = state["exp_avg"] / V.sqrt()
    if valleys:
        found = found * (state["cuts"][0] >= V)
    if "basis_left" in state:
        found = state["basis_left"] @ found @ state["basis_right"].T
    return found.flatten()


def test_curvatures_are_quotients_of_the_hessian():
    model = Quadratic(symmetric())
    optimizer = trained(model)
    v = torch.cat([way(optimizer, model.matrix, valleys=True), torch.zeros(5, dtype=torch.float64)])
    assert int((v != 0).sum()) > 0
    assert valley_curvature(optimizer, model) == pytest.approx(float(v @ model.H @ v / (v @ v)), rel=1e-9)
    v = torch.cat([way(optimizer, p, valleys=False) for p in model.parameters()])
    assert step_curvature(optimizer, model) == pytest.approx(float(v @ model.H @ v / (v @ v)), rel=1e-9)


def test_a_minimum_curves_up_and_a_maximum_down():
    for sign in (1, -1):
        model = Quadratic(sign * torch.eye(17, dtype=torch.float64) * 3)
        optimizer = trained(model)
        assert valley_curvature(optimizer, model) == pytest.approx(3 * sign)


def test_fixed_thresholds_are_in_the_gradients_units():
    model = Quadratic(symmetric())
    optimizer = trained(model, options=TALTOptions(statistical_thresholds=False, thresholds=(1e9, 1e9)))
    v = torch.cat([way(optimizer, model.matrix, valleys=False), torch.zeros(5, dtype=torch.float64)])
    assert valley_curvature(optimizer, model) == pytest.approx(float(v @ model.H @ v / (v @ v)), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_differences_where_there_is_no_second_derivative(dtype):
    model = Quadratic(symmetric(dtype=dtype))
    optimizer = trained(model)
    exact = valley_curvature(optimizer, model)
    found = valley_curvature(optimizer, lambda: model(Once.apply))
    assert found != exact
    assert found == pytest.approx(exact, rel=1e-7 if dtype == torch.float64 else 1e-2)


def noisy(model: Quadratic, *through) -> Tensor:
    return (
        model(*through)
        + (torch.rand(17, dtype=torch.float64) * torch.cat([p.flatten() for p in model.parameters()])).sum()
    )


def test_they_touch_nothing():
    model = Quadratic(symmetric())
    optimizer = trained(model)
    state = {name: value.clone() for name, value in optimizer.state[model.matrix].items()}
    with assert_untouched(model):
        assert valley_curvature(optimizer, lambda: noisy(model)) == pytest.approx(valley_curvature(optimizer, model))
        found = step_curvature(optimizer, lambda: noisy(model, Once.apply))
        assert found == pytest.approx(step_curvature(optimizer, model), rel=1e-6)
    assert all(torch.equal(optimizer.state[model.matrix][name], value) for name, value in state.items())


def test_an_error_of_the_loss_is_told_and_leaves_the_weights():
    model = Quadratic(symmetric())
    optimizer, calls = trained(model), []

    def breaks() -> Tensor:
        calls.append(0)
        if len(calls) == 3:
            raise ValueError("no more data")
        return model(Once.apply)

    with assert_untouched(model), pytest.raises(ValueError, match="no more data"):
        valley_curvature(optimizer, breaks)


def test_nothing_is_known_before_there_is_a_basis():
    model = Quadratic(symmetric())
    assert torch.tensor(valley_curvature(trained(model, steps=1), model)).isnan()
    with pytest.raises(ValueError, match="after two steps or more"):
        phase(trained(model, steps=1))


def after(*gradients: tuple[int, float, float], seed: int = 0):
    """TALT that has seen gradients: how many, how long their common part, how long the noise; and its matrix."""
    matrix = nn.Parameter(torch.zeros(4, 5))
    optimizer, draw = TALT([("matrix", matrix)], 0.0), torch.Generator().manual_seed(seed)
    for count, signal, noise in gradients:
        common = torch.randn(4, 5, generator=draw)
        for _ in range(count):
            matrix.grad = signal * common + noise * torch.randn(4, 5, generator=draw)
            optimizer.step()
    return optimizer, matrix


def test_descending_while_the_gradient_is_large_and_agrees():
    found = phase(after((60, 1.0, 0.5))[0])
    assert found.overall == "descending"
    assert found.tensors == {"matrix": "descending"}
    assert 0.5 < found.coherence <= 1


def test_a_small_gradient_that_is_noise_is_near_a_minimum():
    found = phase(after((30, 1.0, 0.5), (150, 0.0, 0.1))[0])
    assert found.overall == "near_minimum"
    assert found.coherence < 0.1


def test_a_small_gradient_that_agrees_leads_off_a_saddle():
    found = phase(after((30, 1.0, 0.5), (150, 0.02, 0.01))[0])
    assert found.overall == "saddle"
    assert found.gradient < 0.01


def test_noise_alone_is_no_signal_however_early():
    for steps in (4, 40):
        shares = [phase(after((steps, 0.0, 1.0), seed=seed)[0]).coherence for seed in range(6)]
        assert sum(shares) / 6 < 0.15


@pytest.mark.parametrize(("sign", "said"), [(1, "near_minimum"), (-1, "saddle")])
def test_negative_curvature_is_a_saddle(sign, said):
    optimizer, matrix = after((30, 1.0, 0.5), (150, 0.0, 0.1))
    found = phase(optimizer, loss=lambda: sign * matrix.square().sum())
    assert found.overall == said
    assert found.curvature == pytest.approx(2 * sign, rel=1e-4)


@pytest.fixture
def script(load):
    return load("talt_phase")


def test_the_benchmarks_truth_is_the_hessians(script):
    linear = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    zero = torch.zeros(1, 1, dtype=torch.float64)
    for loss, said in ((lambda w, y: (w * w).sum(), "near_minimum"), (lambda w, y: -(w * w).sum(), "saddle")):
        problem = script.Problem(linear, zero + 1, zero, loss, 0.0, 0.0, 1)
        assert script.truth(problem, 0.5) == "descending"
        assert script.truth(problem, 0.01) == said


def test_the_benchmarks_table_counts(script):
    counts = script.Counter({("saddle", "saddle"): 3, ("saddle", "descending"): 1, ("near_minimum", "saddle"): 2})
    rows = {row[1]: row[2:] for row in script.table(counts, "a way")}
    assert rows["saddle"] == ["0.60", "0.75", "5", "4"]
    assert rows["near minimum"] == ["—", "0.00", "0", "2"]
    assert rows["all"] == ["0.50", "", "6", "6"]


def test_the_benchmark_runs(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["talt_phase.py", "--seeds", "0", "1", "--steps", "10", "--every", "10"])
    monkeypatch.setattr(script, "PROBLEMS", {"parity": script.parity})
    try:
        script.main()
    finally:
        torch.set_default_dtype(torch.float32)
    printed = capsys.readouterr().out
    assert "## TALT moves" in printed
    assert "## SGD moves" in printed


def test_a_tensor_of_huge_gradients_outweighs_one_of_small_ones():
    """Each is kept in units of its own; together they count in the gradient's."""

    def watched(sizes):
        parameters = [nn.Parameter(torch.zeros(3, 4, dtype=torch.float64)) for _ in sizes]
        optimizer = TALT(parameters, 1e-3)
        for done in range(12):
            for parameter, size in zip(parameters, sizes, strict=True):
                noise = torch.randn(3, 4, generator=torch.Generator().manual_seed(done), dtype=torch.float64)
                parameter.grad = size * (0.8**done if size > 1 else 1.0) * (noise + 0.5)
            optimizer.step()
        return phase(optimizer)

    both, alone = watched([1e14, 1.0]), watched([1e14])
    assert both.gradient == pytest.approx(alone.gradient, rel=1e-9)
    assert both.gradient != pytest.approx(watched([1.0]).gradient, rel=0.1)
