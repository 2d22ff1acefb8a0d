"""The determinism check: what it must refuse and why, and what it must let pass."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset, WeightedRandomSampler

from cases import Record, classes, mlp, normal, seeded
from losslab.operators.determinism import fingerprint
from losslab.operators.hessian import Hessian
from losslab.operators.risk import EmpiricalRisk
from untouched import assert_untouched

X, Y = normal(24, 4).float(), classes(24)
IMAGES = normal(24, 1, 4, 4, seed=5).float()


def normalized() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)))


def dropping() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 3)))


class Recurrent(nn.Module):
    """Its dropout is a number inside the LSTM, no module."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(2, 3, num_layers=2, dropout=0.5, batch_first=True)

    def forward(self, x):
        return self.lstm(x.unflatten(1, (2, 2)))[0][:, -1]


class Noise(nn.Module):
    def forward(self, x):
        return x + 0.1 * torch.randn_like(x)


def noisy() -> nn.Module:
    return nn.Sequential(Noise(), mlp())


class Augmented(Dataset):
    """Pictures changed at random in one way or another."""

    def __init__(self, change):
        self.change = change

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, index):
        return self.change(IMAGES[index]), Y[index]


CHANGES = {
    "noise": lambda image: image + 0.1 * torch.randn(1, 4, 4),
    "flip": lambda image: image.flip(2) if torch.rand(()) < 0.5 else image,  # leaves the sum of the pixels as it is
    "roll": lambda image: image.roll(int(torch.randint(4, ())), 1),
    "crop": lambda image: F.pad(image, (1, 1, 1, 1))[:, int(torch.randint(3, ())) :, :][:, :4, :4],
}


def loader(**options) -> DataLoader:
    return DataLoader(TensorDataset(X, Y), batch_size=5, **options)


def risk_of(model, batches, **kwargs) -> EmpiricalRisk:
    return EmpiricalRisk(model, nn.CrossEntropyLoss(), batches, **kwargs)


def flat() -> nn.Module:
    return nn.Sequential(nn.Flatten(), seeded(lambda: nn.Linear(16, 3)))


REFUSED = {
    "dropout": (dropping, [(X, Y)], "train", "dropout is active in train mode"),
    "dropout beside BatchNorm": (lambda: dropping().append(nn.BatchNorm1d(3)), [(X, Y)], "train", "dropout is active"),
    "dropout inside an LSTM": (Recurrent, [(X, Y)], "train", "dropout is active"),
    "shuffled BatchNorm": (
        normalized,
        loader(shuffle=True),
        "train",
        "BatchNorm in train mode depends on which examples",
    ),
    "shuffled BatchNorm, own generator": (
        normalized,
        loader(shuffle=True, generator=torch.Generator().manual_seed(5)),
        "train",
        "BatchNorm in train mode depends on which examples",
    ),
    "drop_last": (
        mlp,
        loader(shuffle=True, drop_last=True),
        "eval",
        "drop_last with shuffling leaves out other examples",
    ),
    "drop_last and BatchNorm": (normalized, loader(shuffle=True, drop_last=True), "train", "drop_last with shuffling"),
    "resampling": (mlp, loader(sampler=WeightedRandomSampler([1.0] * 24, 24)), "eval", "the data themselves change"),
    "noise in forward": (noisy, [(X, Y)], "eval", "random numbers inside forward"),
    "noise beside BatchNorm": (
        lambda: nn.Sequential(Noise(), normalized()),
        loader(),
        "train",
        "random numbers inside forward",
    ),
    **{
        f"augmentation: {name}": (
            flat,
            DataLoader(Augmented(change), batch_size=5),
            "eval",
            "the data themselves change",
        )
        for name, change in CHANGES.items()
    },
}

ACCEPTED = {
    "dropout": (dropping, [(X, Y)], "eval"),
    "dropout inside an LSTM": (Recurrent, [(X, Y)], "eval"),
    "dropout with rate zero": (lambda: nn.Sequential(nn.Dropout(0.0), mlp()), [(X, Y)], "train"),
    "shuffled BatchNorm": (normalized, loader(shuffle=True), "eval"),
    "BatchNorm in fixed order": (normalized, loader(), "train"),
    "BatchNorm in fixed order, list": (normalized, [(X[:20], Y[:20]), (X[20:], Y[20:])], "train"),
    "drop_last without shuffling": (normalized, loader(drop_last=True), "train"),
    "augmentation that changes nothing": (flat, DataLoader(Augmented(lambda image: image), shuffle=True), "eval"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_cause(name):
    build, batches, mode, cause = REFUSED[name]
    model = build()
    with assert_untouched(model):
        with pytest.raises(ValueError, match=f"the risk is not deterministic.*likely cause: {cause}"):
            risk_of(model, batches, mode=mode)
        risk_of(model, batches, mode=mode, check=False)


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name):
    build, batches, mode = ACCEPTED[name]
    risk_of(build(), batches, mode=mode)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_shuffling_alone_is_rounding(dtype):
    x, y = normal(512, 4).to(dtype), classes(512)
    batches = DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True)
    risk_of(mlp().to(dtype), batches)


def test_shuffling_where_the_batches_losses_cancel():
    """The mean loss is 0 up to rounding, its terms are of order 40: relative differences of the mean mean nothing."""
    x = normal(700, 4).float()
    x -= x.mean(0)
    model = nn.Linear(4, 1, bias=False)
    nn.init.constant_(model.weight, 100.0)
    batches = DataLoader(TensorDataset(x, x), batch_size=7, shuffle=True)
    EmpiricalRisk(model, lambda output, _: output.mean(), batches)


def test_at_a_minimum_nothing_is_refused():
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.copy_(torch.eye(4))
        model.bias.zero_()
    risk = EmpiricalRisk(model, nn.MSELoss(), DataLoader(TensorDataset(X, X), batch_size=5, shuffle=True))
    assert risk.loss() == pytest.approx(0, abs=1e-12)


def test_a_small_part_that_is_random_is_found():
    class Hardly(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, x):
            return self.body(x) * (1 + 0.01 * torch.rand(()))

    with pytest.raises(ValueError, match="random numbers inside forward"):
        risk_of(Hardly(), [(X, Y)])


def test_without_the_check_every_pass_draws_the_same_numbers():
    risk = risk_of(dropping(), loader(shuffle=True), mode="train", check=False)
    losses = set()
    for _ in range(3):
        torch.rand(1)
        losses.add(risk.loss())
    assert len(losses) == 1
    assert math.isfinite(losses.pop())


def test_fingerprints():
    batch = (IMAGES, Y)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    assert fingerprint((IMAGES[order], Y[order])) == pytest.approx(fingerprint(batch), rel=1e-12)
    halves = fingerprint((IMAGES[:9], Y[:9])) + fingerprint((IMAGES[9:], Y[9:]))
    assert halves == pytest.approx(fingerprint(batch), rel=1e-12)
    assert fingerprint(Record(IMAGES, Y)) == fingerprint(batch)
    for other in ((IMAGES.flip(3), Y), (IMAGES.flip(2), Y), (-IMAGES, Y), (IMAGES, Y + 1), (IMAGES[:23], Y[:23])):
        assert fingerprint(other) != pytest.approx(fingerprint(batch), abs=1e-3)
    odd = (torch.tensor(2.0), torch.ones(3, 0), torch.ones(2, dtype=torch.bool), torch.eye(2).to_sparse(), "words")
    assert math.isfinite(fingerprint(odd))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_fingerprints_of_what_is_not_finite(bad):
    """Missing labels and masks: equal where the data are equal, and only there."""
    x = IMAGES.clone()
    x[0, 0, 0, 0] = bad
    assert fingerprint(x) == fingerprint(x.clone()) != fingerprint(IMAGES)
    moved = IMAGES.clone()
    moved[0, 0, 0, 1] = bad
    assert fingerprint(moved) != pytest.approx(fingerprint(x), abs=1e-3)


def test_missing_labels_may_be_read_again():
    """The first batch's graph is kept, the others are streamed: the first one is recognised."""

    def loss_fn(output, target):
        return (output - target)[~target.isnan()].square().mean()

    x, y = normal(12, 4), normal(12, 3)
    y[::3] = math.nan
    batches = [(x[:6], y[:6]), (x[6:], y[6:])]
    whole = Hessian(EmpiricalRisk(mlp().double(), loss_fn, batches))
    expected = whole.to_dense()
    part = Hessian(EmpiricalRisk(mlp().double(), loss_fn, batches, graph_memory=int(0.75 * whole.kept_bytes)))
    torch.testing.assert_close(part.to_dense(), expected)
    assert part.num_kept == 1
    torch.testing.assert_close(part.to_dense(), expected)
