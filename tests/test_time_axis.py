"""N is the number of examples, also of data whose first axis is time."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence

import losslab
from cases import classes, normal, seeded
from losslab import EmpiricalRisk, Hessian
from losslab.operators.batches import count_examples

STEPS, EXAMPLES = 5, 7
X, Y = normal(STEPS, EXAMPLES, 4), classes(EXAMPLES)


class Last(nn.Module):
    """Classes from the last step of a recurrent layer, or of attention."""

    def __init__(self, layer: nn.Module, *, turned: bool = False):
        super().__init__()
        self.layer, self.head, self.turned = layer, nn.Linear(4, 3), turned

    def forward(self, x):
        if self.turned:
            x = x.transpose(0, 1)
        found = self.layer(x, x, x)[0] if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)[0]
        return self.head(found if self.turned else found.transpose(0, 1))


def every_step(output, target):
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


LAYERS = {
    "LSTM": lambda: nn.LSTM(4, 4),
    "GRU": lambda: nn.GRU(4, 4),
    "attention": lambda: nn.MultiheadAttention(4, 2),
}


@pytest.fixture(params=LAYERS, ids=str)
def layer(request):
    return seeded(LAYERS[request.param]).double()


def test_time_first_inputs_with_targets_of_examples_are_refused(layer):
    model = Last(layer).double()
    with pytest.raises(ValueError, match=r"examples on the first axis .* got shapes \(5, 7, 4\) and \(7,\)"):
        EmpiricalRisk(model, lambda output, target: F.cross_entropy(output[:, -1], target), [(X, Y)])
    risk = EmpiricalRisk(
        model,
        lambda output, target: F.cross_entropy(output[:, -1], target),
        [(X[:, :4], Y[:4]), (X[:, 4:], Y[4:])],
        count_examples=lambda batch: batch[0].shape[1],
    )
    expected = F.cross_entropy(model(X)[:, -1], Y)
    assert risk.loss() == pytest.approx(float(expected.detach()), rel=1e-12)


def time_first(layer, *sizes, **options):
    """Targets of every step lie time-first too: the shapes agree, and say nothing."""
    batches = [(normal(STEPS, n, 4), classes(STEPS, n)) for n in sizes]
    return EmpiricalRisk(
        Last(layer).double(), lambda output, target: every_step(output.transpose(0, 1), target), batches, **options
    )


@pytest.mark.parametrize("sizes", [(7,), (STEPS, 7)], ids=["at once", "by the second batch"])
def test_a_layer_that_takes_the_counted_axis_for_time_is_refused(layer, sizes):
    with pytest.raises(ValueError, match=r"axis that 'layer' .*takes for time, with 7 examples.*pass count_examples="):
        time_first(layer, *sizes)
    assert not layer._forward_pre_hooks
    counted = time_first(layer, *sizes, count_examples=lambda batch: batch[0].shape[1])
    assert counted.num_examples == sum(sizes)


def test_as_many_steps_as_examples_are_counted_right(layer):
    assert time_first(layer, STEPS, STEPS).num_examples == 2 * STEPS


def test_a_model_that_turns_its_batches_itself_is_counted_by_the_first_axis(layer):
    model = Last(layer, turned=True).double()
    batches = [(normal(n, STEPS, 4), classes(STEPS, n)[0]) for n in (7, 5)]
    risk = EmpiricalRisk(model, lambda output, target: F.cross_entropy(output[-1], target), batches)
    assert risk.num_examples == 12


def test_batch_first_layers_and_single_sequences_pass():
    model = seeded(lambda: Last(nn.LSTM(4, 4, batch_first=True))).double()
    risk = EmpiricalRisk(model, lambda output, target: output.square().mean(), [(normal(7, 5, 4), classes(7))])
    assert risk.num_examples == 7
    alone = seeded(lambda: nn.Sequential(nn.RNN(4, 3))).double()  # (time, features): nothing is said of examples
    EmpiricalRisk(alone, lambda output, _: output[0].square().mean(), [(normal(5, 4), None)])


def test_packed_sequences():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.RNN(4, 4)

        def forward(self, x):
            return self.rnn(pack_padded_sequence(x, [STEPS] * x.shape[1]))[1]

    model = seeded(Packed).double()
    with pytest.raises(ValueError, match="takes for time, with 7 examples"):
        EmpiricalRisk(model, lambda output, _: output.square().mean(), [(X, None)])


def test_targets_of_all_examples_in_one_are_refused_and_can_be_counted():
    tokens = classes(4, 6, num=8)
    model = seeded(lambda: nn.Embedding(8, 8)).double()
    flat = [(tokens, tokens.flatten())]
    loss = lambda output, target: F.cross_entropy(output.flatten(0, 1), target)  # noqa: E731
    with pytest.raises(ValueError, match=r"got shapes \(4, 6\) and \(24,\)"):
        EmpiricalRisk(model, loss, flat)
    assert EmpiricalRisk(model, loss, flat, count_examples=lambda batch: len(batch[1])).num_examples == 24


def test_which_targets_are_compared():
    for fits in (Y, (Y, Y.double()), None, torch.tensor(1.0), [{"boxes": normal(2, 4)}] * 7):
        assert count_examples((X.transpose(0, 1), fits)) == EXAMPLES
    assert count_examples({"input_ids": Y, "labels": Y}) == EXAMPLES
    for other in ((X, (Y, Y)), {"input_ids": X, "labels": Y}):
        with pytest.raises(ValueError, match="pass count_examples="):
            count_examples(other)


def test_a_sum_over_time_first_data_has_the_curvature_of_a_mean_over_examples():
    """The number that was wrong: N divides every sum."""
    model = seeded(lambda: Last(nn.RNN(4, 4))).double()
    loss = nn.CrossEntropyLoss(reduction="sum")
    risk = EmpiricalRisk(
        model, lambda output, y: loss(output[:, -1], y) / len(y), [(X, Y)], count_examples=lambda b: b[0].shape[1]
    )
    summed = EmpiricalRisk(
        model, _Sum(), [(X[:, :3], Y[:3]), (X[:, 3:], Y[3:])], count_examples=lambda b: b[0].shape[1]
    )
    vector = normal(risk.space.size)
    torch.testing.assert_close(Hessian(summed) @ vector, Hessian(risk) @ vector, rtol=1e-9, atol=1e-12)


CUT = {
    "subset": lambda risk: risk.subset(3),
    "max_examples": lambda risk: time_first(seeded(LAYERS["LSTM"]), 7, max_examples=3, count_examples=second_axis),
    "m": lambda risk: losslab.sharpness(risk, method="ascent", options=losslab.SharpnessOptions(m=2)),
    "kernel of a part": lambda risk: losslab.kernel(risk, num_examples=3),
    "per-example gradients": losslab.GradientCovariance,
}


def second_axis(batch):
    return batch[0].shape[1]


@pytest.mark.parametrize("name", CUT)
def test_targets_are_never_cut_beside_whole_inputs(name):
    """Inputs (5, 7, 4) with targets (7,): the kernel of 3 examples took all 7, with 3 labels."""
    risk = EmpiricalRisk(
        seeded(lambda: Last(nn.LSTM(4, 4))).double(),
        lambda output, y: F.mse_loss(output[:, -1, 0], y),
        [(X, normal(EXAMPLES))],
        count_examples=second_axis,
    )
    with pytest.raises(ValueError, match=r"7 examples on its first axis, got shapes \[\(5, 7, 4\), .*put the examples"):
        CUT[name](risk)


class _Sum:
    reduction = "sum"

    def __call__(self, output, target):
        return F.cross_entropy(output[:, -1], target, reduction="sum")
