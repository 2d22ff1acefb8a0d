"""What is asked of a risk at other points than the model's: score, BatchNorm statistics, one batch at a time."""

import contextlib
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cases import classes, conv_batchnorm, mlp, normal, paired, seeded
from losslab.operators.accuracy import guessing_accuracy, score_at
from losslab.operators.batch_statistics import batch_statistics
from losslab.operators.minibatches import minibatch_loss, minibatches
from losslab.operators.risk import EmpiricalRisk
from losslab.ranks import ALONE, Ranks
from processes import run_ranks
from untouched import assert_untouched


def test_score_is_loss_and_share_of_right_answers():
    case = paired(mlp(), nn.CrossEntropyLoss(), normal(7, 4), classes(7), [3, 4])
    risk, theta = case.risk(), case.risk().space.vector() * 1.5
    x, y = normal(7, 4), classes(7)
    logits = torch.func.functional_call(case.model, risk.space.named_views(theta), (x,))
    score = score_at(risk, theta)
    assert score.loss == pytest.approx(risk.loss_at(theta), rel=1e-12)
    assert score.accuracy == pytest.approx(float((logits.argmax(1) == y).double().mean()))


def test_ignored_targets_and_positions():
    logits = torch.zeros(1, 2, 3, dtype=torch.float64)
    logits[0, 1, 0] = logits[0, 0, 1] = 1.0  # position 0 says class 1, position 1 class 0
    targets = torch.tensor([[1, 1, -100]])
    model = nn.Linear(1, 1).double()
    risk = EmpiricalRisk(
        model, lambda output, _: output.mean(), [(torch.zeros(1, 1, dtype=torch.float64), targets)], check=False
    )
    risk.output = lambda parameters, batch: logits
    assert score_at(risk, risk.space.vector()).accuracy == 0.5


@pytest.mark.parametrize("wrap", [dict, SimpleNamespace])
def test_score_of_mappings_and_objects(wrap):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x, labels):
            logits = self.layer(x)
            return wrap(logits=logits, loss=F.cross_entropy(logits, labels))

    model = seeded(Named).double()
    x, y = normal(6, 4), classes(6)
    risk = EmpiricalRisk(model, None, [{"x": x, "labels": y}])
    expected = float((model.layer(x).argmax(1) == y).double().mean())
    assert score_at(risk, risk.space.vector()).accuracy == pytest.approx(expected)


def test_a_single_logit_has_no_accuracy():
    """Its largest score is always the first: "all of class 0" would be the answer."""
    model = seeded(lambda: nn.Linear(4, 1)).double()

    def loss_fn(output, target):
        return nn.functional.binary_cross_entropy_with_logits(output.squeeze(1), target.double())

    risk = EmpiricalRisk(model, loss_fn, [(normal(8, 4), classes(8, num=2))])
    assert math.isnan(score_at(risk, risk.space.vector()).accuracy)
    assert math.isnan(guessing_accuracy(risk))


def test_regression_has_no_accuracy():
    case = paired(mlp(), nn.MSELoss(), normal(5, 4), normal(5, 3, seed=2), [5])
    score = score_at(case.risk(), case.risk().space.vector())
    assert score.accuracy != score.accuracy
    assert score.loss > 0


def batchnorm_case():
    return paired(seeded(conv_batchnorm), nn.CrossEntropyLoss(), normal(7, 1, 4, 4), classes(7), [4, 3])


def test_batch_statistics_are_the_size_weighted_means():
    case = batchnorm_case()
    risk = case.risk()
    theta = risk.space.vector() * 1.3
    seen = []
    (layer,) = [m for m in case.model.modules() if isinstance(m, nn.BatchNorm2d)]
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with assert_untouched(case.model):
        found = batch_statistics(risk, theta)
    hook.remove()
    means = sum(len(x) / 7 * x.mean((0, 2, 3)) for x in seen)
    variances = sum(len(x) / 7 * x.var((0, 2, 3)) for x in seen)
    (mean,) = [value for name, value in found.items() if name.endswith("running_mean")]
    (variance,) = [value for name, value in found.items() if name.endswith("running_var")]
    torch.testing.assert_close(mean, means)
    torch.testing.assert_close(variance, variances)
    assert risk.loss_at(theta, found) != pytest.approx(risk.loss_at(theta))


def test_no_batch_norm_no_statistics():
    risk = paired(mlp(), nn.CrossEntropyLoss(), normal(4, 4), classes(4), [4]).risk()
    assert batch_statistics(risk, risk.space.vector()) == {}


def test_interrupted_statistics_leave_the_model_alone():
    case = batchnorm_case()
    risk = case.risk()

    def stop(*_):
        raise KeyboardInterrupt

    with assert_untouched(case.model):
        hook = case.model.register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            batch_statistics(risk, risk.space.vector())
        hook.remove()
    assert all(m.momentum == 0.1 for m in case.model.modules() if isinstance(m, nn.BatchNorm2d))


def _scores_over_ranks(ranks: Ranks):
    case = batchnorm_case()
    risk = EmpiricalRisk(case.model, case.loss_fn, case.batches[ranks.rank :: ranks.count], ranks=ranks)
    theta = risk.space.vector() * 1.3
    score, found = score_at(risk, theta), batch_statistics(risk, theta)
    return [score.loss, score.accuracy, *(float(tensor.sum()) for tensor in found.values())]


def test_over_processes(tmp_path):
    alone = _scores_over_ranks(ALONE)
    for found in run_ranks(_scores_over_ranks, 2, tmp_path):
        assert found == pytest.approx(alone, rel=1e-10)


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(F.dropout(x, 0.5, self.training))


def shuffled_risk() -> EmpiricalRisk:
    data = torch.utils.data.TensorDataset(normal(8, 4), classes(8))
    loader = torch.utils.data.DataLoader(data, batch_size=3, shuffle=True)
    return EmpiricalRisk(seeded(Dropping).double(), nn.CrossEntropyLoss(), loader, mode="train", check=False)


def losses(start: int, stop: int) -> list[float]:
    risk = shuffled_risk()
    parameters = risk.space.named_views(risk.space.vector())
    with contextlib.closing(minibatches(risk, seed=3, start=start)) as stream:
        taken = itertools.islice(stream, stop - start)
        return [float(minibatch_loss(risk, parameters, *item)) for item in taken]


def test_minibatches_go_on_bit_for_bit():
    whole = losses(0, 8)
    assert whole == losses(0, 8)
    assert losses(0, 5) + losses(5, 8) == whole
    assert len({round(loss, 9) for loss in whole}) == 8  # another order and other masks in each pass


def test_minibatches_leave_modes_and_random_states():
    risk = shuffled_risk()
    with assert_untouched(risk.model):
        stream = minibatches(risk)
        next(stream)
        stream.close()


def test_minibatch_loss_is_a_mean_for_both_reductions():
    for reduction in ("mean", "sum"):
        case = paired(mlp(), nn.CrossEntropyLoss(reduction=reduction), normal(7, 4), classes(7), [3, 4])
        risk = case.risk()
        parameters = risk.space.named_views(risk.space.vector())
        with contextlib.closing(minibatches(risk)) as stream:
            batch, count = next(stream)
            with torch.no_grad():
                expected = float(F.cross_entropy(case.model(batch[0]), batch[1]))
                assert float(minibatch_loss(risk, parameters, batch, count)) == pytest.approx(expected)
