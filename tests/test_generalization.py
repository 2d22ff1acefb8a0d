"""generalization: closed forms on quadratics, the bound against its inequality and by enumeration, refusals."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import nn

from cases import classes, conv_batchnorm, gen, mlp, normal, paired, seeded
from losslab.operators.accuracy import guessing_accuracy
from losslab.operators.dense import DenseOperator
from losslab.operators.risk import EmpiricalRisk
from losslab.probes.effective_dimension import effective_dimension
from losslab.probes.generalization import GeneralizationOptions, generalization
from losslab.probes.pac_bayes import SIGMAS, Posterior, bound_of, kl_inverse
from losslab.report import matplotlib_backend, plotly_backend
from losslab.report.charts.generalization import generalization as charts
from losslab.report.contents import read
from losslab.solvers.budget import Budget
from losslab.status import Status, StopRequested
from report_folders import start_run
from untouched import assert_untouched

QUICK = GeneralizationOptions(num_samples=4, num_nodes=6, num_probes=2)


class Bowl(nn.Module):
    """½ Σ hᵢθᵢ² at θ = 0, the same for each example but for a constant of its own: the example itself."""

    def __init__(self, curvatures: np.ndarray):
        super().__init__()
        self.register_buffer("h", torch.as_tensor(curvatures))
        self.theta = nn.Parameter(torch.zeros(len(curvatures), dtype=torch.float64))

    def forward(self, x):
        return x + 0.5 * (self.h * self.theta**2).sum()


def bowl(curvatures: np.ndarray, constants: list[float]) -> EmpiricalRisk:
    x = torch.tensor(constants, dtype=torch.float64)
    batches = [(x[:2], torch.zeros(2)), (x[2:], torch.zeros(len(x) - 2))]
    return EmpiricalRisk(Bowl(curvatures), lambda output, target: output.mean(), batches)


def classifier(num: int = 8, seed: int = 0) -> EmpiricalRisk:
    return paired(mlp(), nn.CrossEntropyLoss(), normal(num, 4, seed=seed), classes(num), [5, num - 5]).risk()


def test_gap_with_standard_errors():
    train, test = [1.0, 2.0, 4.0, 1.0, 2.0], [3.0, 5.0, 4.0]
    result = generalization(bowl(np.ones(3), train), test=bowl(np.ones(3), test), options=QUICK)
    error = math.hypot(np.std(test, ddof=1) / 3**0.5, np.std(train, ddof=1) / 5**0.5)
    found = [result.loss_gap, result.loss_gap_error]
    np.testing.assert_allclose(found, [np.mean(test) - np.mean(train), error], rtol=1e-12)
    assert (result.train.num_examples, result.test.num_examples) == (5, 3)
    assert np.isnan([result.accuracy_gap, result.pac_bayes.bound, result.guessing_error]).all()
    assert (result.vacuous, result.rise_of, result.status) == (None, "loss", Status.complete)


def test_classes():
    risk, test = classifier(), classifier(6, seed=5)
    test = EmpiricalRisk(risk.model, risk.loss_fn, test.batches)
    result = generalization(risk, test=test, options=QUICK)

    def plain(r):
        x, y = (torch.cat([batch[i] for batch in r.batches]) for i in (0, 1))
        with torch.no_grad():
            losses = nn.functional.cross_entropy(r.model(x), y, reduction="none")
            return losses.numpy(), float((r.model(x).argmax(1) == y).double().mean()), len(y)

    for split, (losses, accuracy, num) in ((result.train, plain(risk)), (result.test, plain(test))):
        assert split.loss == pytest.approx(losses.mean())
        assert split.loss_error == pytest.approx(losses.std(ddof=1) / num**0.5)
        assert split.accuracy == pytest.approx(accuracy)
        assert split.accuracy_error == pytest.approx((accuracy * (1 - accuracy) / num) ** 0.5)
    assert result.accuracy_gap == pytest.approx(result.train.accuracy - result.test.accuracy)
    assert result.rise_of == "error rate"
    counts = np.bincount(torch.cat([batch[1] for batch in risk.batches]).numpy())
    assert result.guessing_error == pytest.approx(1 - counts.max() / 8)
    assert result.vacuous
    assert "vacuous: no better than guessing" in str(result)
    assert result.pac_bayes.next_sigma == np.inf
    assert ", the largest tried, before the error rate rises by" in str(result)
    earlier = dataclasses.replace(result, pac_bayes=dataclasses.replace(result.pac_bayes, next_sigma=1.0))
    assert ", where the error rate rises by" in str(earlier)


@pytest.mark.parametrize("allowed", [1e-3, 0.1, 5.0])
def test_sigma_is_where_the_expected_rise_is_allowed(allowed):
    """E[L(σz) − L(0)] = ½σ² tr H; by the same draws the rise is exactly σ² times one number."""
    curvatures = np.linspace(0.2, 3, 400)
    result = generalization(bowl(curvatures, [1.0, 2.0, 3.0]), allowed_rise=allowed, options=QUICK)
    found = result.pac_bayes
    exact = math.sqrt(2 * allowed / curvatures.sum())
    # The samples' scatter: zᵀHz is known to √(2 ΣH²/m) of tr H, here 4 %, and σ to half of that; the grid to 12 %.
    scatter = 0.5 * math.sqrt(2 * (curvatures**2).sum() / 4) / curvatures.sum()
    assert found.sigma * (1 - 3 * scatter) <= exact <= found.next_sigma * (1 + 3 * scatter)
    assert found.next_sigma / found.sigma == pytest.approx(10**0.05)
    place = np.searchsorted(SIGMAS, found.sigma)
    assert SIGMAS[place] == found.sigma
    ratios = found.rises / found.sigmas**2
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-6)
    assert (found.rises[found.sigmas <= found.sigma] <= allowed).all()
    assert (found.rises[found.sigmas > found.sigma] > allowed).all()
    # Drawn anew, and so with other numbers than in the search; the quadratic model is exact.
    assert abs(found.loss_rise - result.predicted_loss_rise) < 4 * found.loss_rise_error
    assert found.loss_rise != pytest.approx(ratios[0] * found.sigma**2, rel=1e-9)
    assert result.sharpness_term == pytest.approx(math.sqrt(found.largest_rise / 3))


def test_the_ends_of_the_grid():
    options = GeneralizationOptions(num_samples=2, num_nodes=2, num_probes=2)
    flat = generalization(bowl(np.full(2, 1e-9), [1.0, 2.0, 3.0]), options=options).pac_bayes
    assert (flat.sigma, flat.next_sigma) == (10.0, math.inf)
    steep = generalization(bowl(np.full(2, 1e12), [1.0, 2.0, 3.0]), options=options).pac_bayes
    assert (steep.sigma, steep.next_sigma) == (0.0, SIGMAS[0])


@pytest.mark.parametrize(("error", "limit"), list(itertools.product([0.0, 0.01, 0.3, 0.9], [1e-6, 0.01, 0.5, 1.0])))
def test_kl_inverse_solves_its_equation(error, limit):
    p = kl_inverse(error, limit)
    terms = [q * math.log(q / r) if q else 0.0 for q, r in ((error, p), (1 - error, 1 - p))]
    assert sum(terms) == pytest.approx(limit, rel=1e-6)
    assert p >= error


def test_kl_inverse_at_its_ends():
    assert kl_inverse(0.3, 0.0) == 0.3
    assert kl_inverse(1.0, 0.2) == 1.0
    assert kl_inverse(0.5, 1e6) == 1.0
    assert kl_inverse(0.5, math.inf) == 1.0
    assert math.isnan(kl_inverse(math.nan, 0.1))


def test_bound_is_written_out():
    delta, n, m = 0.025, 1000, 30
    inner = kl_inverse(0.1, math.log(2 / delta) / m)
    expected = kl_inverse(inner, (12.0 + math.log(2 * math.sqrt(n) * 101 / delta)) / n)
    assert bound_of(0.1, m, 12.0, n, 0.95) == pytest.approx(expected)
    assert 0.1 < inner < expected < bound_of(0.1, m, 40.0, n, 0.95) < 1
    assert bound_of(0.1, m, 12.0, n, 0.99) > expected


def test_bound_holds_by_enumeration():
    """One fixed rule of true error 0.3 (KL 0): over all 2ⁿ training sets the bound fails with probability ≤ δ."""
    n, truth = 20, 0.3
    for confidence in (0.5, 0.9):
        fails = sum(
            binom.pmf(wrong, n, truth)
            for wrong in range(n + 1)
            if kl_inverse(wrong / n, math.log(2 * math.sqrt(n) / (1 - confidence)) / n) < truth
        )
        assert fails <= 1 - confidence


def test_kl_comes_from_the_distance_to_the_prior():
    risk = classifier()
    with torch.no_grad():  # all right, so that there is something to lose
        risk = EmpiricalRisk(risk.model, risk.loss_fn, [(x, risk.model(x).argmax(1)) for x, _ in risk.batches])
    theta = risk.space.vector()
    zero, near = (generalization(risk, prior=p, options=QUICK).pac_bayes for p in (None, 0.9 * theta))
    length = float(theta.norm())
    assert (zero.distance, near.distance) == (pytest.approx(length), pytest.approx(0.1 * length))
    assert zero.sigma == near.sigma
    assert 0 < near.sigma < 1
    assert near.kl == pytest.approx((0.1 * length) ** 2 / (2 * near.sigma**2))
    assert near.bound == pytest.approx(bound_of(near.gibbs_error, 4, near.kl, 8, 0.95))
    assert near.bound <= zero.bound
    same = generalization(risk, prior=risk.model, options=QUICK).pac_bayes
    assert same.kl == 0
    assert same.bound == pytest.approx(bound_of(same.gibbs_error, 4, 0.0, 8, 0.95))


def test_a_bound_that_says_something():
    """Two clouds far apart, a line between them, 600 examples: flat enough to be told with few bits."""
    generator = gen(3)
    labels = torch.arange(600) % 2
    x = torch.randn(600, 2, generator=generator, dtype=torch.float64) + 3.0 * (2 * labels.unsqueeze(1) - 1)
    model = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), [(x, labels)])
    result = generalization(risk, options=GeneralizationOptions(num_samples=100, num_nodes=4, num_probes=2))
    assert result.pac_bayes.sigma > 0.3
    assert result.pac_bayes.gibbs_error < 0.2
    assert result.pac_bayes.bound < 0.4 < result.guessing_error == 0.5
    assert result.vacuous is False
    assert result.caveat == ""


def spent() -> Budget:
    return Budget(10_000)


def test_effective_dimension_is_exact_where_lanczos_sees_everything():
    values = np.array([-0.5, 0.0, 0.1, 1.0, 3.0, 10.0])
    operator = DenseOperator(torch.diag(torch.tensor(values)))
    dimension, trace, status = effective_dimension(operator, 0.25, 6, 2, spent(), 0)
    expected = sum(v / (v + 0.25) for v in values if v > 0)
    assert (dimension.value, trace.value) == (pytest.approx(expected, rel=1e-9), pytest.approx(values.sum()))
    assert (dimension.standard_error, status.ok) == (0.0, True)


def test_located_eigenvalues_count_once_and_the_rest_is_unbiased():
    """Three outliers, one of them threefold, over a bulk: z-scores of 12 independent estimates."""
    values = np.concatenate([[100.0, 80.0, 50.0, 50.0, 50.0], np.linspace(0.01, 2, 95)])
    basis = torch.linalg.qr(torch.randn(100, 100, generator=gen(1), dtype=torch.float64))[0]
    operator = DenseOperator(basis @ torch.diag(torch.tensor(values)) @ basis.mT)
    exact = (values / (values + 0.5)).sum(), values.sum()
    scores = []
    for seed in range(12):
        found = effective_dimension(operator, 0.5, 30, 6, spent(), seed)[:2]
        scores.append([(f.value - e) / f.standard_error for f, e in zip(found, exact, strict=True)])
        assert abs(found[0].value / exact[0] - 1) < 0.1
    assert (np.abs(np.mean(scores, axis=0)) < 4 / math.sqrt(12)).all()
    assert np.abs(scores).max() < 6  # t with five degrees of freedom


def test_a_multiple_of_the_identity():
    """One Lanczos step sees all there is; the rest of the trace has the other 49."""
    operator = DenseOperator(3.0 * torch.eye(50, dtype=torch.float64))
    dimension, trace, _ = effective_dimension(operator, 1.0, 9, 3, spent(), 0)
    assert dimension.value == pytest.approx(50 * 0.75, rel=0.05)
    assert trace.value == pytest.approx(150, rel=0.05)


def test_ridge_is_one_over_n_and_can_be_given():
    risk = bowl(np.array([0.5, 1.0, 2.0]), [1.0, 2.0, 3.0, 4.0])
    default, given = generalization(risk, options=QUICK), generalization(risk, ridge=2.0, options=QUICK)
    assert (default.ridge, given.ridge) == (0.25, 2.0)
    for result in (default, given):
        expected = sum(h / (h + result.ridge) for h in (0.5, 1.0, 2.0))
        assert result.effective_dimension.value == pytest.approx(expected)


def test_guessing_accuracy_counts_every_answer():
    targets = torch.tensor([[0, 1, 1], [-1, 1, 2]])
    model = nn.Sequential(nn.Linear(3, 12), nn.Unflatten(1, (4, 3))).double()
    loss = nn.CrossEntropyLoss(ignore_index=-1, reduction="sum")
    risk = EmpiricalRisk(model, loss, [(normal(2, 3), targets), (normal(1, 3), targets[:1])])
    assert guessing_accuracy(risk) == pytest.approx(5 / 8)


def test_caveats():
    batchnorm = paired(seeded(conv_batchnorm), nn.CrossEntropyLoss(), normal(6, 1, 4, 4), classes(6), [4, 2]).risk()
    assert "BatchNorm's statistics" in generalization(batchnorm, options=QUICK).caveat
    assert "not chosen" in generalization(classifier().restrict("2.*"), options=QUICK).caveat
    assert generalization(classifier(), options=QUICK).caveat == ""


def test_nan_is_said():
    class Root(Bowl):
        def forward(self, x):
            return x + torch.sqrt(-self.theta.square().sum() + 1e-12)

    x = torch.ones(4, dtype=torch.float64)
    risk = EmpiricalRisk(Root(np.ones(2)), lambda output, target: output.mean(), [(x, x)])
    result = generalization(risk, options=QUICK)
    assert result.status is Status.nonfinite
    assert np.isnan(result.pac_bayes.rises[result.pac_bayes.sigmas > 1e-5]).all()
    assert result.train.loss == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("calls", [2, 30, 33])
def test_stop_key_keeps_what_is_known(calls):
    seen = 0

    def stop(done, total, note):
        nonlocal seen
        seen += 1
        if seen == calls:
            raise StopRequested

    risk = paired(mlp(), nn.CrossEntropyLoss(), normal(8, 4), classes(8), [5, 3]).risk()
    whole, result = generalization(risk, options=QUICK), generalization(risk, options=QUICK, progress=stop)
    assert result.status is Status.stopped
    assert result.train == whole.train
    assert math.isnan(result.effective_dimension.value)
    if calls > 30:
        assert result.pac_bayes.bound == whole.pac_bayes.bound
    else:
        assert math.isnan(result.pac_bayes.bound)


def test_search_takes_seven_widths_at_most():
    risk, seen = classifier(), []
    posterior = Posterior(risk, risk.loss(), math.nan, 2, 0, lambda note: bool(seen.append(note)) or True)
    for allowed in (1e-9, 1e-3, 0.1, 1e9):
        seen.clear()
        posterior.search(allowed)
        assert len(seen) <= 14


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"allowed_rise": 0.0}, "allowed_rise: expected a finite number > 0, got 0.0"),
        ({"ridge": -1.0}, "ridge: expected a finite number > 0, got -1.0"),
        ({"prior": torch.ones(3)}, r"prior: expected a tensor of shape \(43,\)"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        generalization(classifier(), **arguments)


@pytest.mark.parametrize("option", [{"num_samples": 1}, {"confidence": 1.0}, {"num_probes": 0}, {"num_nodes": 2.5}])
def test_options_are_checked(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        GeneralizationOptions(**option)


def test_a_loss_that_mixes_examples_is_refused():
    risk = paired(mlp(), nn.CrossEntropyLoss(), normal(8, 4), classes(8), [5, 3]).risk()
    mixed = EmpiricalRisk(risk.model, lambda o, t: (o.mean(0) ** 2).sum(), risk.batches)
    with pytest.raises(ValueError, match="expected the loss of a batch to be the mean of its examples' losses"):
        generalization(mixed)


def test_models_stay():
    risk, test = classifier(), classifier(6, seed=5)
    for model in (risk.model, test.model):
        with assert_untouched(model):
            generalization(risk, test=test, prior=test.model, options=QUICK)


@pytest.mark.parametrize("kind", ["classes", "loss only", "no test"])
def test_chart_shows_the_record(tmp_path, kind):
    risk = bowl(np.ones(3), [1.0, 2.0, 4.0, 1.0]) if kind == "loss only" else classifier()
    result = generalization(risk, test=None if kind == "no test" else risk, options=QUICK)
    start_run(tmp_path / "run").write_probe("generalization", "1", *result.to_record())
    (chart,) = charts(read(tmp_path / "run"), {"run": "#000000"})
    gaps, rises = (panel.series[0] for panel in chart.panels)
    np.testing.assert_array_equal(rises.y, result.pac_bayes.rises)
    if kind == "classes":
        expected = [1 - result.train.accuracy, 1 - result.test.accuracy, result.pac_bayes.bound]
    elif kind == "loss only":
        expected = [result.train.loss, result.test.loss]
    else:
        expected = [1 - result.train.accuracy, result.pac_bayes.bound]
    np.testing.assert_allclose(gaps.y, expected)
    matplotlib_backend.save(chart, tmp_path / "picture.png")
    assert len(plotly_backend.figure(chart).data) >= 2
