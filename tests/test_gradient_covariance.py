"""The covariance of per-example gradients against explicit gradients, where vmap works and where it does not."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from cases import Unused, classes, mlp, normal, seeded, split
from losslab.operators import example_gradients
from losslab.operators.gradient_covariance import GradientCovariance
from losslab.operators.risk import EmpiricalRisk
from untouched import assert_untouched

X, Y = normal(10, 4), classes(10)


class Branching(nn.Module):
    """Control flow that depends on the data."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        h = self.layer(x)
        return torch.cat([h[i : i + 1].tanh() if x[i].sum() > 0 else h[i : i + 1].sin() for i in range(len(x))])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(2, 3, batch_first=True)

    def forward(self, x):
        return self.lstm(x.unflatten(1, (2, 2)))[0][:, -1]


MODELS = {
    "plain": mlp,
    "control flow": Branching,
    "LSTM": Recurrent,
    "unused": Unused,
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)),
}


def explicit(risk: EmpiricalRisk, centred: bool) -> torch.Tensor:
    rows = []
    for x, y in zip(X, Y, strict=True):
        loss = F.cross_entropy(risk.model(x[None]), y[None])
        grads = torch.autograd.grad(loss, list(risk.model.parameters()), allow_unused=True)
        rows.append(risk.space.flatten(grads))
    g = torch.stack(rows)
    g = g - g.mean(0) if centred else g
    return g.T @ g / len(g)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_equals_explicit_gradients(name, centred, reduction):
    model = seeded(MODELS[name]).double()
    loss_fn = nn.CrossEntropyLoss(reduction=reduction)
    for sizes, graph_memory in (([10], "auto"), ([3, 6, 1], "auto"), ([3, 6, 1], 0), ([3, 6, 1], 6000)):
        risk = EmpiricalRisk(model, loss_fn, split(sizes, X, Y), graph_memory=graph_memory)
        operator = GradientCovariance(risk, centred=centred)
        vectors = normal(operator.size, 3)
        expected = explicit(risk, centred) @ vectors
        for _ in range(2):
            torch.testing.assert_close(operator @ vectors, expected, rtol=1e-8, atol=1e-12)


def test_the_loop_over_examples_is_used_and_agrees(monkeypatch):
    def refused(*args, **kwargs):
        return lambda *_: (_ for _ in ()).throw(RuntimeError("vmap: no rule"))

    risk = EmpiricalRisk(mlp().double(), nn.CrossEntropyLoss(), split([4, 6], X, Y))
    expected = GradientCovariance(risk).to_dense()
    monkeypatch.setattr(example_gradients, "vmap", refused)
    torch.testing.assert_close(GradientCovariance(risk).to_dense(), expected, rtol=1e-10, atol=1e-13)


def test_positive_semidefinite_of_rank_below_the_number_of_examples():
    risk = EmpiricalRisk(mlp().double(), nn.CrossEntropyLoss(), split([4, 6], X, Y))
    values = torch.linalg.eigvalsh(GradientCovariance(risk).to_dense())
    assert float(values[0]) > -1e-12
    assert int((values > 1e-10).sum()) <= 9


def test_lower_precision():
    expected = GradientCovariance(EmpiricalRisk(mlp().double(), nn.CrossEntropyLoss(), split([4, 6], X, Y)))
    v = normal(expected.size)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
        batches = [(x.to(dtype), y) for x, y in split([4, 6], X, Y)]
        low = GradientCovariance(EmpiricalRisk(mlp().to(dtype), nn.CrossEntropyLoss(), batches)) @ v.to(dtype)
        assert low.dtype == dtype
        assert float((low.double() - expected @ v).norm() / (expected @ v).norm()) < tolerance


def test_shuffled_loader_with_some_graphs_kept():
    model = mlp().double()
    expected = explicit(EmpiricalRisk(model, nn.CrossEntropyLoss(), [(X, Y)]), True)
    loader = DataLoader(TensorDataset(X, Y), batch_size=3, shuffle=True, generator=torch.Generator())
    operator = GradientCovariance(EmpiricalRisk(model, nn.CrossEntropyLoss(), loader))
    operator @ normal(operator.size)
    one = operator._graphs.kept[0].num_bytes()
    operator = GradientCovariance(EmpiricalRisk(model, nn.CrossEntropyLoss(), loader, graph_memory=2 * one))
    for _ in range(3):
        torch.testing.assert_close(operator.to_dense(), expected, rtol=1e-8, atol=1e-12)
        torch.rand(1)
    assert 0 < len(operator._graphs.kept) < 4


@pytest.mark.parametrize(
    "build",
    [lambda: nn.BatchNorm1d(5), lambda: nn.Sequential(nn.Unflatten(1, (1, 5)), nn.BatchNorm1d(1), nn.Flatten())],
)
def test_batchnorm_in_train_mode_is_refused(build):
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 5), build(), nn.Tanh(), nn.Linear(5, 3))).double()
    for sizes in ([10], [1, 9] if isinstance(model[1], nn.Sequential) else [4, 6]):
        risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), split(sizes, X, Y), mode="train")
        with assert_untouched(model), pytest.raises(ValueError, match=r"per-example gradients: expected .*mode='eval'"):
            GradientCovariance(risk)
    GradientCovariance(EmpiricalRisk(model, nn.CrossEntropyLoss(), [(X, Y)], mode="eval"))


def test_losses_that_mix_examples_are_refused_even_when_the_first_batch_is_one_example():
    risk = EmpiricalRisk(mlp().double(), lambda output, _: output.logsumexp((0, 1)), split([1, 9], X, Y))
    with pytest.raises(ValueError, match="to be the mean of its examples' losses"):
        GradientCovariance(risk)


def test_class_weights_are_refused():
    """Torch's weighted mean divides by the batch's sum of weights: no mean over examples."""
    loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.1], dtype=torch.float64))

    def hidden(output, targets):  # EmpiricalRisk itself refuses the ones it can see
        return loss_fn(output, targets)

    with pytest.raises(ValueError, match="to be the mean of its examples' losses"):
        GradientCovariance(EmpiricalRisk(mlp().double(), hidden, [(X, Y)]))


def test_examples_must_be_on_the_first_axis():
    x, y = normal(5, 7, 4), classes(5, 7)
    risk = EmpiricalRisk(
        seeded(lambda: nn.Linear(4, 3)).double(),
        lambda output, target: F.cross_entropy(output.flatten(0, 1), target.flatten()),
        [(x, y)],
        count_examples=lambda batch: batch[0].shape[1],
    )
    with pytest.raises(
        ValueError, match=r"the batch's 7 examples on its first axis, got shapes \[\(5, 7, 4\), \(5, 7\)\]"
    ):
        GradientCovariance(risk)


def test_parameters_that_the_loss_does_not_use():
    risk = EmpiricalRisk(seeded(Unused).double(), nn.CrossEntropyLoss(), split([4, 6], X, Y), params="idle")
    for centred in (True, False):
        assert not GradientCovariance(risk, centred=centred).to_dense().any()


def test_single_examples():
    risk = EmpiricalRisk(mlp().double(), nn.CrossEntropyLoss(), split([1] * 10, X, Y))
    torch.testing.assert_close(GradientCovariance(risk).to_dense(), explicit(risk, True), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["explicit", "implicit"])
@pytest.mark.parametrize("sizes", [[1], [5, 3]], ids=["one example", "equal ones"])
def test_no_scatter_is_exactly_zero(dtype, method, sizes):
    """E[gᵢgᵢᵀ] and ḡḡᵀ are the same matrix: rounding alone, which is not symmetric, is no matrix for a solver."""
    x, y = X[:1].to(dtype).repeat(sum(sizes), 1), Y[:1].repeat(sum(sizes))
    risk = EmpiricalRisk(mlp().to(dtype), nn.CrossEntropyLoss(), split(sizes, x, y))
    assert float(risk.gradient().norm()) > 0.1
    assert not GradientCovariance(risk, method=method).to_dense().any()


def test_a_small_scatter_about_a_large_mean_stays():
    """gᵢ = 10⁴ ± 1: C is a 10⁻⁸ of E[gᵢgᵢᵀ], far above the rounding of float64."""
    model = seeded(lambda: nn.Linear(1, 1, bias=False)).double()
    x = torch.tensor([[1e4 - 1], [1e4 + 1]], dtype=torch.float64)
    risk = EmpiricalRisk(model, lambda output, _: output.mean(), [(x, x)])
    assert float(GradientCovariance(risk).to_dense()) == pytest.approx(1.0, rel=1e-6)


def test_a_missing_second_derivative_is_explained():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return 2 * grad

    class Culprit(nn.Module):
        def forward(self, x):
            return Once.apply(x)

    model = nn.Sequential(nn.Linear(4, 3), Culprit()).double()
    operator = GradientCovariance(EmpiricalRisk(model, nn.CrossEntropyLoss(), [(X, Y)]))
    with pytest.raises(RuntimeError, match="second derivatives: module '1' has none"):
        operator @ normal(operator.size)


@pytest.mark.parametrize("bad", [torch.zeros(3), None, torch.zeros(1, 43)])
def test_wrong_shapes(bad):
    operator = GradientCovariance(EmpiricalRisk(mlp().double(), nn.CrossEntropyLoss(), [(X, Y)]))
    with pytest.raises(ValueError, match=r"matrix: expected a tensor of shape \(43, k\)"):
        operator @ bad
