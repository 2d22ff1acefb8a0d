"""The sampled Fisher information: exact expectation by enumeration, fixed labels, and what is refused."""

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cases import Keyed, classes, mlp, normal, seeded, split
from losslab.operators.fisher import Fisher
from losslab.operators.gauss_newton import GaussNewton
from losslab.operators.gradient_covariance import GradientCovariance
from losslab.operators.risk import EmpiricalRisk

X, Y = normal(10, 4), classes(10)
SIZES = [3, 3, 3, 1]
TARGETS = {nn.CrossEntropyLoss: Y, nn.BCEWithLogitsLoss: normal(10, 3).sigmoid(), nn.MSELoss: normal(10, 3, seed=2)}


def make_risk(loss_fn, y: Tensor, *, sizes=SIZES, **kwargs) -> EmpiricalRisk:
    return EmpiricalRisk(mlp().double(), loss_fn, split(list(sizes), X, y), **kwargs)


# -- the expectation is GaussNewton


class ByPosition(nn.Module):
    """Logits (B, C, 2) of two positions."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.layer = nn.Linear(2, num_classes)

    def forward(self, x):
        return torch.tanh(self.layer(x)).movedim(-1, 1)


def binary(chances: Tensor):
    """All ways to draw zeros and ones, each with its probability."""
    for bits in itertools.product((0.0, 1.0), repeat=chances.numel()):
        drawn = torch.tensor(bits, dtype=torch.float64).view_as(chances)
        yield drawn, torch.where(drawn == 1, chances, 1 - chances).prod()


def categorical(chances: Tensor):
    """All ways to draw one class a position from (B, C, …)."""
    last = chances.movedim(1, -1)
    flat = last.flatten(0, -2)
    for choice in itertools.product(range(flat.shape[1]), repeat=len(flat)):
        drawn = torch.tensor(choice)
        yield drawn.view(last.shape[:-1]).unsqueeze(1), flat.gather(1, drawn.unsqueeze(1)).prod()


def classifier(num_classes: int, loss_fn: nn.Module, x: Tensor, y: Tensor) -> tuple:
    model = seeded(lambda: ByPosition(num_classes)).double()
    return model, loss_fn, x, y, categorical(model(x).softmax(1).detach())


def by_softmax(loss_fn: nn.Module, y=(0, 2, 1)) -> tuple:
    return classifier(3, loss_fn, normal(3, 2), torch.tensor(y))


def by_sigmoid(loss_fn: nn.Module) -> tuple:
    model = seeded(lambda: nn.Sequential(nn.Linear(2, 2), nn.Tanh())).double()
    x = normal(2, 2)
    return model, loss_fn, x, normal(2, 2, seed=3).sigmoid(), binary(model(x).sigmoid().detach())


def by_normal(loss_fn: nn.Module) -> tuple:
    """F is linear in the squared distances, so their expectation ½ stands for all labels."""
    model = seeded(lambda: nn.Sequential(nn.Linear(2, 2), nn.Tanh())).double()
    half = torch.full((3, 2), 0.5, dtype=torch.float64)
    return model, loss_fn, normal(3, 2), normal(3, 2, seed=3), [(half, 1.0)]


ENUMERATED = {
    "cross-entropy": lambda: by_softmax(nn.CrossEntropyLoss()),
    "cross-entropy, summed": lambda: by_softmax(nn.CrossEntropyLoss(reduction="sum")),
    "label smoothing": lambda: by_softmax(nn.CrossEntropyLoss(label_smoothing=0.3)),
    "ignored index": lambda: by_softmax(nn.CrossEntropyLoss(ignore_index=2)),
    "sequences": lambda: classifier(2, nn.CrossEntropyLoss(), normal(2, 2, 2), classes(2, 2, num=2)),
    "sequences, summed": lambda: classifier(
        2, nn.CrossEntropyLoss(reduction="sum"), normal(2, 2, 2), classes(2, 2, num=2)
    ),
    "sequences, ignored index": lambda: classifier(
        2, nn.CrossEntropyLoss(ignore_index=7), normal(2, 2, 2), torch.tensor([[0, 7], [1, 1]])
    ),
    "BCE": lambda: by_sigmoid(nn.BCEWithLogitsLoss()),
    "BCE, summed": lambda: by_sigmoid(nn.BCEWithLogitsLoss(reduction="sum")),
    "MSE": lambda: by_normal(nn.MSELoss()),
    "MSE, summed": lambda: by_normal(nn.MSELoss(reduction="sum")),
}


@pytest.mark.parametrize("name", ENUMERATED)
def test_the_mean_over_all_labels_is_gauss_newton(name):
    model, loss_fn, x, y, labels = ENUMERATED[name]()
    risk = EmpiricalRisk(model, loss_fn, [(x, y)], graph_memory=0)
    fisher, expected = Fisher(risk), GaussNewton(risk).to_dense()
    (key,) = fisher._labels.drawn
    total, mass = torch.zeros_like(expected), 0.0
    for drawn, probability in labels:
        assert fisher._labels.drawn[key].shape == drawn.shape
        fisher._labels.drawn[key] = drawn
        total += probability * fisher.to_dense()
        mass += float(probability)
    assert mass == pytest.approx(1, abs=1e-12)
    assert float(expected.norm()) > 1e-2
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize(("reduction", "num_samples"), [("mean", 1), ("sum", 5)])
def test_unbiased(kind, reduction, num_samples):
    """A fixed number of draws; |z| < 4 fails by chance once in 16,000."""
    risk = make_risk(kind(reduction=reduction), TARGETS[kind], sizes=[10], check=False)
    v = normal(risk.space.size, seed=5)
    forms = torch.stack([v @ (Fisher(risk, num_samples=num_samples, seed=seed) @ v) for seed in range(100)])
    exact = v @ (GaussNewton(risk) @ v)
    assert abs(float((forms.mean() - exact) / (forms.std() / 100**0.5))) < 4
    assert float(forms.std() / exact) > 0.05  # it is sampled at all


@pytest.mark.parametrize("kind", TARGETS)
def test_the_error_falls_with_the_root_of_the_samples(kind):
    """In the mean over ten seeds: 100 times the samples, a tenth of the error, within a third."""
    risk = make_risk(kind(), TARGETS[kind], sizes=[10], check=False)
    exact = GaussNewton(risk).to_dense()

    def error(num_samples: int) -> float:
        found = [Fisher(risk, num_samples=num_samples, seed=seed).to_dense() for seed in range(10)]
        return float(torch.stack([(f - exact).square().sum() for f in found]).mean().sqrt())

    assert error(100) / error(1) == pytest.approx(0.1, rel=0.33)


def test_it_is_the_empirical_fisher_of_the_labels_that_were_drawn():
    risk = make_risk(nn.CrossEntropyLoss(), Y)
    fisher = Fisher(risk)
    drawn = torch.cat([labels[:, 0] for labels in fisher._labels.drawn.values()]).long()
    assert not torch.equal(drawn, Y)
    empirical = GradientCovariance(make_risk(nn.CrossEntropyLoss(), drawn), centred=False)
    torch.testing.assert_close(fisher.to_dense(), empirical.to_dense(), rtol=1e-10, atol=1e-13)


def test_positive_semidefinite():
    for kind, y in TARGETS.items():
        values = torch.linalg.eigvalsh(Fisher(make_risk(kind(), y), num_samples=2).to_dense())
        assert float(values[0]) > -1e-13


# -- fixed labels


def test_the_seed_decides():
    risk = make_risk(nn.CrossEntropyLoss(), Y)
    dense = Fisher(risk, seed=3).to_dense()
    assert torch.equal(Fisher(risk, seed=3).to_dense(), dense)
    assert not torch.allclose(Fisher(risk, seed=4).to_dense(), dense)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    assert torch.equal(Fisher(risk, seed=generators[0]).to_dense(), Fisher(risk, seed=generators[1]).to_dense())
    assert not torch.allclose(Fisher(risk, seed=generators[0]).to_dense(), dense)  # it was advanced


@pytest.mark.parametrize("kind", TARGETS)
def test_labels_do_not_depend_on_order_memory_or_precision(kind):
    risk = make_risk(kind(), TARGETS[kind])
    expected = Fisher(risk).to_dense()
    for graph_memory in (0, 4000, "auto"):
        for batches in (risk.batches, risk.batches[::-1]):
            again = EmpiricalRisk(risk.model, kind(), batches, graph_memory=graph_memory)
            torch.testing.assert_close(Fisher(again).to_dense(), expected, rtol=1e-10, atol=1e-13)
    single = Fisher(risk.to(torch.float32)).to_dense()
    torch.testing.assert_close(single.double(), expected, rtol=1e-3, atol=1e-5)


def test_equal_targets_do_not_mean_equal_draws():
    """Batches of one class, as sorted data have them, get labels of their own."""
    risk = EmpiricalRisk(mlp().double(), nn.MSELoss(), split([5, 5], X, torch.zeros(10, 3).double()))
    first, second = Fisher(risk)._labels.drawn.values()
    assert not torch.isclose(first, second).any()


def test_a_batch_that_appears_twice_is_allowed():
    batches = split([3, 7], X, Y)
    once, twice = (
        Fisher(EmpiricalRisk(mlp().double(), nn.CrossEntropyLoss(), b)).to_dense() for b in (batches, 2 * batches)
    )
    torch.testing.assert_close(once, twice, rtol=1e-10, atol=1e-13)


def test_a_batch_that_was_not_there_is_refused():
    batches = split([3, 7], X, Y)
    operator = Fisher(EmpiricalRisk(mlp().double(), nn.CrossEntropyLoss(), batches))
    batches[1] = (batches[1][0].flip(0), batches[1][1].flip(0))  # the same examples, in another order
    with pytest.raises(ValueError, match="batches: expected those for which labels were drawn"):
        operator @ normal(operator.size)


class OnWords(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 3)

    def forward(self, text):
        return self.layer(torch.tensor([[float(len(word))] for word in text.split()], dtype=torch.float64))


def test_inputs_that_are_no_tensors_are_refused_where_they_matter():
    batches = [("a bcd", torch.tensor([0, 1])), ("efghij k", torch.tensor([0, 1]))]

    def fisher(chosen):
        return Fisher(
            EmpiricalRisk(
                seeded(OnWords).double(), nn.CrossEntropyLoss(), chosen, count_examples=lambda batch: len(batch[1])
            ),
            num_samples=20,
        )

    with pytest.raises(ValueError, match="batches: expected the model's inputs to be tensors, got two batches that"):
        fisher(batches)
    fisher(batches[:1])


# -- losses


FUNCTIONS = {
    nn.CrossEntropyLoss: F.cross_entropy,
    nn.BCEWithLogitsLoss: F.binary_cross_entropy_with_logits,
    nn.MSELoss: F.mse_loss,
}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_functions_as_well_as_modules(kind):
    for options in ({}, {"reduction": "sum"}):
        expected = Fisher(make_risk(kind(**options), TARGETS[kind])).to_dense()
        found = Fisher(make_risk(partial(FUNCTIONS[kind], **options), TARGETS[kind])).to_dense()
        torch.testing.assert_close(found, expected)
    plain = Fisher(make_risk(FUNCTIONS[kind], TARGETS[kind])).to_dense()
    torch.testing.assert_close(plain, Fisher(make_risk(kind(), TARGETS[kind])).to_dense())


def test_options_of_a_function():
    y = torch.tensor([0, 1, 5, 2, 5, 0, 1, 2, 0, 5])
    expected = Fisher(make_risk(nn.CrossEntropyLoss(ignore_index=5), y, sizes=[10])).to_dense()
    found = Fisher(make_risk(partial(F.cross_entropy, ignore_index=5, weight=None), y, sizes=[10])).to_dense()
    torch.testing.assert_close(found, expected)


class Own(nn.CrossEntropyLoss):
    def forward(self, input, target):
        return super().forward(input, target) ** 2


W = torch.ones(3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("loss_fn", "got"),
    [
        (lambda f, y: F.cross_entropy(f, y) + 0 * f.sum(), "<lambda>"),
        (nn.NLLLoss(), "NLLLoss"),
        (Own(), "Own"),
        (partial(Own()), "Own"),
        (F.l1_loss, "l1_loss"),
    ],
)
def test_other_losses_are_refused(loss_fn, got):
    y = normal(10, 3) if loss_fn is F.l1_loss else Y
    with pytest.raises(ValueError, match=rf"^loss_fn: expected CrossEntropyLoss, .* got {got}, .* use GaussNewton"):
        Fisher(make_risk(loss_fn, y))


def test_a_model_with_its_own_loss_is_refused():
    risk = EmpiricalRisk(seeded(Keyed).double(), None, [{"features": X, "labels": Y}])
    with pytest.raises(ValueError, match=r"^loss_fn: expected CrossEntropyLoss, .* got NoneType"):
        Fisher(risk)


@pytest.mark.parametrize(
    ("loss_fn", "y", "got"),
    [
        (nn.CrossEntropyLoss(weight=W, reduction="sum"), Y, "weight"),
        (partial(F.cross_entropy, weight=W, reduction="sum"), Y, "weight"),
        (nn.BCEWithLogitsLoss(pos_weight=2 * W), normal(10, 3).sigmoid(), "pos_weight"),
        (nn.BCEWithLogitsLoss(weight=W), normal(10, 3).sigmoid(), "weight"),
        (partial(F.mse_loss, size_average=False), normal(10, 3), "size_average"),
    ],
)
def test_weights_and_other_options_are_refused(loss_fn, y, got):
    with pytest.raises(ValueError, match=rf"^loss_fn: expected no options but .*, got {got}; use GaussNewton"):
        Fisher(make_risk(loss_fn, y, sizes=[10], check=False))


@pytest.mark.parametrize(
    ("loss_fn", "y", "message"),
    [
        (nn.CrossEntropyLoss(), normal(10, 3).softmax(1), "class indices"),
        (nn.MSELoss(), normal(10, 1), "targets in the outputs' shape"),
        (nn.CrossEntropyLoss(), [Y], "targets that are one"),
    ],
)
def test_targets_that_do_not_fit_are_refused(loss_fn, y, message):
    risk = EmpiricalRisk(mlp().double(), loss_fn, [(X, y)], check=False)
    with pytest.raises(ValueError, match=f"^batches: expected .*{message}.*, got .*; use GaussNewton"):
        Fisher(risk)


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, None, "3"])
def test_a_bad_number_of_samples_is_refused(bad):
    with pytest.raises(ValueError, match="num_samples: expected a number >= 1, got"):
        Fisher(make_risk(nn.CrossEntropyLoss(), Y), num_samples=bad)


def test_a_bad_seed_is_refused():
    with pytest.raises(TypeError, match=r"seed: expected an int or a torch\.Generator"):
        Fisher(make_risk(nn.CrossEntropyLoss(), Y), seed=1.5)


def test_ragged_batches_with_ignored_positions_weigh_as_the_loss_does():
    """count_examples counts what the loss averages over; every split gives one and the same Gauss-Newton matrix."""
    y = torch.tensor([0, 1, 5, 2, 5, 0, 1, 2, 0, 5])

    def counted(batch) -> int:
        return int((batch[1] != 5).sum())

    loss_fn = nn.CrossEntropyLoss(ignore_index=5)
    whole = GaussNewton(make_risk(loss_fn, y, sizes=[10], count_examples=counted)).to_dense()
    parts = make_risk(loss_fn, y, sizes=[4, 6], count_examples=counted)
    torch.testing.assert_close(GaussNewton(parts).to_dense(), whole)
    many = Fisher(parts, num_samples=20_000).to_dense()
    assert float((many - whole).norm() / whole.norm()) < 0.02
