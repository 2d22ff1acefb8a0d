"""Every row of the optimizers' table: its steps are the paper's, its state can be saved, Fabric drives it."""

import json
from importlib import metadata
from pathlib import Path

import pytest
import safetensors.torch
import torch
from lightning_fabric import Fabric
from torch import nn

import optimizer_twins as twins
from losslab.optim import FIXES, TALT, TALTOptions
from losslab.optim.groups import hidden_matrices
from losslab.status import StopRequested
from losslab.studies import optimizers
from losslab.studies.config import apply, from_assignments, make_config
from losslab.studies.optimizer_rows import BASES, NAMES, OWN, ROWS, row_of
from losslab.studies.optimizer_section import OptimizerConfig
from losslab.studies.optimizers import OPTIMIZERS, build_optimizer, evaluating, keeps_an_average, second_gradient
from losslab.studies.packing import pack, unpack
from losslab.studies.record import RunFolder
from losslab.studies.runs import load_run
from losslab.studies.talt_section import TALTConfig
from losslab.studies.train import train

COUPLED = {"sgd", "momentum", "nesterov", "adam", "shampoo", "sam on sgd", "schedule_free on sgd"}
TWO_GRADIENTS = {"sam on sgd", "sam on adamw"}
AVERAGED = {"schedule_free on sgd", "schedule_free on adamw"}
ROUNDING_ERRORS = ("narrow.bias", "wide.bias")  # are the gradients of these, before a batch normalisation

every_row = pytest.mark.parametrize("row", ROWS)


def configured(row, **values):
    name, _, base = row.partition(" on ")
    if row == OWN:
        name, rate = "module:torch.optim.AdamW", {key: values.pop(key) for key in ("lr",) if key in values}
        values = {**rate, "options": values}
    return OptimizerConfig.model_validate({"name": name, **({"base": base} if base else {}), **values})


class Small(nn.Module):
    """An embedding, convolutions with one and with three channels, a gain, hidden layers, a head."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 16)
        self.narrow = nn.Conv2d(1, 3, 2)
        self.wide = nn.Conv2d(3, 4, 2)
        self.norm = nn.BatchNorm2d(4)
        self.hidden = nn.Linear(16, 6)
        self.head = nn.Linear(6, 3)
        self.to(memory_format=torch.channels_last)

    def forward(self, tokens):
        images = self.table(tokens).view(-1, 1, 4, 4)
        return self.head(self.hidden(self.norm(self.wide(self.narrow(images))).flatten(1)).relu())


@pytest.fixture
def model():
    torch.manual_seed(3)
    return Small()


def losses(model, optimizer, steps, clip=None):
    """Train on ten fixed examples; the loss before each step."""
    tokens, targets = torch.arange(10) % 5, torch.arange(10) % 3
    found = []

    def gradient():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens), targets)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        return loss

    for _ in range(steps):
        found.append(gradient().item())
        optimizer.step(gradient) if second_gradient(optimizer) else optimizer.step()
    return found


def same(first, second):
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(one == other and torch.equal(a, b) for (one, a), (other, b) in pairs)


# The rules themselves.


class Bowl(nn.Module):
    """½Σ aᵢⱼ(Wᵢⱼ−1)² + ½‖sW‖², as hard to follow along the axes as it is between them."""

    def __init__(self, *shape):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))
        self.scale = torch.rand(*shape, generator=generator, dtype=torch.float64) + 0.5
        self.mix = torch.randn(shape[0], shape[0], generator=generator, dtype=torch.float64)

    def gradient(self, weight):
        mixed = torch.tensordot(self.mix.T @ self.mix, weight, dims=1)
        return self.scale * (weight - 1) + 0.3 * mixed

    def steps(self, config, rates):
        optimizer = build_optimizer(config, self)

        def gradient():
            self.weight.grad = self.gradient(self.weight.detach())

        for rate in rates:
            for group in optimizer.param_groups:
                group["lr"] = rate
            gradient()
            optimizer.step(gradient) if second_gradient(optimizer) else optimizer.step()
            yield optimizer


RATES = [0.01, 0.02, *[0.03] * 20, 0.02, 0.01]
RULES = {
    "lion": ({"betas": (0.8, 0.95)}, lambda *a, betas, wd: twins.lion(*a, betas=betas, decay=wd)),
    "sam on sgd": (
        {"rho": 0.3, "momentum": 0.8},
        lambda *a, rho, momentum, wd: twins.sam(*a, rho=rho, momentum=momentum, decay=wd),
    ),
    "soap": ({"betas": (0.9, 0.8)}, lambda *a, betas, wd: twins.soap(*a, betas=betas, decay=wd, every=10)),
    "shampoo": ({}, lambda *a, wd: twins.shampoo(*a, decay=wd, epsilon=1e-4)),
}


SHAPES = {"soap": [(3, 4)]}  # its twin takes matrices


@pytest.mark.parametrize(
    ("row", "shape"),
    [(row, shape) for row in RULES for shape in SHAPES.get(row, [(3, 4), (5,), (2, 3, 4), (2, 3, 1, 2)])],
)
def test_steps_are_the_papers(row, shape):
    settings, rule = RULES[row]
    bowl = Bowl(*shape)
    expected = rule(bowl.weight.detach().clone(), bowl.gradient, RATES, **settings, wd=0.1)
    config = configured(row, **settings, weight_decay=0.1)
    for wanted, _ in zip(expected, bowl.steps(config, RATES), strict=True):
        # The library has a float32 norm in SAM and a float32 basis in SOAP.
        tolerance = {"sam on sgd": 1e-6, "soap": 1e-5}.get(row, 1e-9)
        torch.testing.assert_close(bowl.weight.detach(), wanted, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("row", "settings", "rule"),
    [
        ("schedule_free on sgd", {"momentum": 0.8}, lambda *a: twins.schedule_free_sgd(*a, beta=0.8, decay=0.1)),
        (
            "schedule_free on adamw",
            {"betas": (0.8, 0.95)},
            lambda *a: twins.schedule_free_adamw(*a, betas=(0.8, 0.95), decay=0.1),
        ),
    ],
)
def test_schedule_free_steps_and_average_are_the_papers(row, settings, rule):
    bowl = Bowl(3, 4)
    expected = rule(bowl.weight.detach().clone(), bowl.gradient, RATES)
    config = configured(row, **settings, weight_decay=0.1)
    for (trained, averaged), optimizer in zip(expected, bowl.steps(config, RATES), strict=True):
        torch.testing.assert_close(bowl.weight.detach(), trained, rtol=1e-7, atol=1e-8)
        with evaluating(optimizer):
            torch.testing.assert_close(bowl.weight.detach(), averaged, rtol=1e-7, atol=1e-8)


def test_soap_leaves_vectors_to_adam():
    """No basis is computed for them: Adam one step late, since SOAP's first step only measures."""
    bowl, other = Bowl(6), Bowl(6)
    adam = torch.optim.Adam([other.weight], 0.01, (0.9, 0.95))
    for number, _ in enumerate(bowl.steps(configured("soap", betas=(0.9, 0.95)), [0.01] * 8)):
        if number > 0:
            other.weight.grad = other.gradient(other.weight.detach())
            adam.step()
        torch.testing.assert_close(bowl.weight, other.weight, rtol=1e-5, atol=1e-6)


def test_sam_on_adamw_is_adamw_at_the_second_gradient():
    bowl, other = Bowl(3, 4), Bowl(3, 4)
    adamw = torch.optim.AdamW([other.weight], 0.02, weight_decay=0.1)
    for _ in bowl.steps(configured("sam on adamw", rho=0.3, weight_decay=0.1), [0.02] * 5):
        weight = other.weight.detach()
        gradient = other.gradient(weight)
        other.weight.grad = other.gradient(weight + 0.3 * gradient / gradient.norm())
        adamw.step()
        torch.testing.assert_close(bowl.weight, other.weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("values", "kind", "settings"),
    [
        ({"name": "momentum"}, torch.optim.SGD, {"momentum": 0.9, "nesterov": False, "lr": 0.05}),
        ({"name": "nesterov", "momentum": 0.8}, torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
        ({"name": "sgd"}, torch.optim.SGD, {"momentum": 0, "nesterov": False, "lr": 0.1}),
        ({"name": "adam"}, torch.optim.Adam, {"lr": 1e-3, "betas": (0.9, 0.999)}),
    ],
)
def test_rows_of_torch_have_their_settings(values, kind, settings, model):
    optimizer = build_optimizer(OptimizerConfig.model_validate(values), model)
    assert type(optimizer) is kind
    assert {key: optimizer.param_groups[0][key] for key in settings} == settings


# Muon.


def test_hidden_matrices_are_muons_and_the_rest_is_adamws(model):
    assert [id(p) for p in hidden_matrices(model)] == [
        id(layer.weight) for layer in (model.narrow, model.wide, model.hidden)
    ]
    muon, adamw = build_optimizer(configured("muon"), model).param_groups
    assert [p.shape for p in muon["params"]] == [(3, 1, 2, 2), (4, 3, 2, 2), (6, 16)]
    assert len(muon["params"]) + len(adamw["params"]) == len(list(model.parameters()))
    assert (adamw["betas"], muon["momentum"], muon["lr"], adamw["lr"]) == ((0.9, 0.95), 0.95, 3e-3, 3e-3)


def test_tied_embeddings_stay_adamws():
    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False))
    net[2].weight = net[0].weight
    assert [id(p) for p in hidden_matrices(net)] == [id(net[1].weight)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [1, 3])
def test_kernels_are_muons_matrices(layout, channels):
    """One row for each output channel, with torch's own Muon, whatever the memory layout."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.Flatten(), nn.Linear(4, 2)).to(memory_format=layout)
    matrix = nn.Parameter(net[0].weight.detach().flatten(1).clone())
    settings = {"momentum": 0.9, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    reference = torch.optim.Muon([matrix], 0.02, **settings)
    optimizer = build_optimizer(configured("muon", lr=0.02, momentum=0.9, weight_decay=0.1), net)
    before = net[0].weight.detach().clone()
    for seed in range(3):
        gradient = torch.randn(before.shape, generator=torch.Generator().manual_seed(seed))
        net[0].weight.grad = gradient.to(memory_format=layout)
        matrix.grad = gradient.flatten(1)
        optimizer.step()
        reference.step()
        assert torch.equal(net[0].weight.flatten(1), matrix)
    assert not torch.equal(net[0].weight, before)
    assert net[0].weight.is_contiguous(memory_format=layout)


def test_muons_rest_is_torchs_adamw(model):
    other = Small()
    other.load_state_dict(model.state_dict())
    muon = build_optimizer(configured("muon", lr=0.02, weight_decay=0.1), model)
    adamw = torch.optim.AdamW([other.head.weight, other.table.weight], 0.02, (0.9, 0.95), weight_decay=0.1)
    for net, optimizer in ((model, muon), (other, adamw)):
        for p in (net.head.weight, net.table.weight):
            p.grad = p.detach().sin()
        optimizer.step()
        optimizer.step()
    assert torch.equal(model.head.weight, other.head.weight)
    assert torch.equal(model.table.weight, other.table.weight)


def test_muon_needs_hidden_weights(monkeypatch, model):
    with pytest.raises(ValueError, match=r"^optimizer.name: muon: expected a network with hidden weights, got none; "):
        build_optimizer(configured("muon"), nn.Linear(3, 2))
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match=r"^optimizer.name: muon: expected torch >= 2.9, got .*; pip install -U torch"):
        build_optimizer(configured("muon"), model)


# TALT.


def test_talt_has_all_its_settings(model):
    """Hidden weights have the structure that is asked for, the rest is diagonal; options are TALT's own."""
    usual = build_optimizer(configured("talt"), model)
    assert type(usual) is TALT
    assert {key: usual.param_groups[0][key] for key in ("lr", "betas", "structure")} == {
        "lr": 5e-3, "betas": (0.9, 0.99), "structure": "auto",
    }  # fmt: skip
    assert all(usual.defaults[key] == value for key, value in vars(TALTOptions()).items())
    given = {"structure": "lowrank", "adaptive_memory": False, "clip": 3, "thresholds": [0.1, 0.2], "base_memory": 4}
    optimizer = build_optimizer(configured("talt", lr=0.1, weight_decay=0.2, betas=(0.8, 0.7), talt=given), model)
    hidden, rest = optimizer.param_groups
    assert [id(p) for p in hidden["params"]] == [id(p) for p in hidden_matrices(model, ("embedding",))]
    assert (hidden["structure"], rest["structure"]) == ("lowrank", "diagonal")
    for group in (hidden, rest):
        assert (group["lr"], group["weight_decay"], group["betas"]) == (0.1, 0.2, (0.8, 0.7))
        assert [group[fix] for fix in FIXES] == [False, *[True] * 5, False, False]
        assert (group["clip"], group["thresholds"], group["base_memory"]) == (3, (0.1, 0.2), 4)


def test_talt_without_eigenspaces_is_adamw(model):
    other = Small()
    other.load_state_dict(model.state_dict())
    talt = {"structure": "diagonal", "nesterov": False}
    ours = build_optimizer(configured("talt", lr=0.02, betas=(0.8, 0.9), weight_decay=0.1, talt=talt), model)
    losses(model, ours, 5)
    losses(other, build_optimizer(configured("adamw", lr=0.02, betas=(0.8, 0.9), weight_decay=0.1), other), 5)
    for (name, p), wanted in zip(model.named_parameters(), other.parameters(), strict=True):
        if name not in ROUNDING_ERRORS:
            torch.testing.assert_close(p, wanted, rtol=1e-4, atol=1e-5)


def test_the_section_has_every_option_of_talt_under_its_name_and_with_its_default():
    options = TALTConfig().options()
    assert options == TALTOptions()
    # The framework has no loss for the probe, which is asked on request only.
    assert set(TALTConfig.model_fields) - {"structure"} == set(vars(options)) - {"probe_interval"}
    changed = {
        "clip": 2.0,
        "thresholds": [0.5, None],
        "match_rms": 0.2,
        "percentiles": [1, 99],
        "trigger": "off_diagonal",
    }
    section = make_config({"optimizer": {"name": "talt", "talt": changed}}).optimizer.talt
    assert section.options() == TALTOptions(
        clip=2.0, thresholds=(0.5, float("inf")), match_rms=0.2, percentiles=(1.0, 99.0), trigger="off_diagonal"
    )


def test_one_fix_is_switched_by_its_name_and_the_run_holds_all(tmp_path):
    given = ["optimizer.name=talt", "optimizer.talt.adaptive_memory=false", "optimizer.talt.clip=4"]
    few = ["model.name=mlp", "model.width=4", "training.max_steps=3", "dataset.train_examples=64"]
    config = from_assignments([*given, *few])
    run = train(config, RunFolder.create(tmp_path / "run"))
    held = run.config["optimizer"]["talt"]
    assert held == {**TALTConfig().model_dump(mode="json"), "adaptive_memory": False, "clip": 4}
    assert make_config(run.config) == config
    assert run.final is not None


# What every row promises.


@every_row
def test_decreases_a_loss_with_its_defaults(row, model):
    found = losses(model, build_optimizer(configured(row), model), 40)
    assert found[-1] < 0.98 * found[0]


@every_row
def test_saved_and_loaded_in_the_middle_it_goes_on_bit_for_bit(row, model):
    """Through plain values and tensors only, as a checkpoint has them. Past the tenth step SOAP's basis is turned."""
    config = configured(row, weight_decay=0.01)
    optimizer = build_optimizer(config, model)
    losses(model, optimizer, 8)
    tree, tensors = pack({"optimizer": optimizer.state_dict(), "model": model.state_dict()})
    texts = json.dumps(tree), safetensors.torch.save(tensors)
    losses(model, optimizer, 8)

    fresh = Small()
    resumed = build_optimizer(config, fresh)
    saved = unpack(json.loads(texts[0]), safetensors.torch.load(texts[1]))
    fresh.load_state_dict(saved["model"])
    assert not same(fresh, model)
    resumed.load_state_dict(saved["optimizer"])
    losses(fresh, resumed, 8)
    assert same(fresh, model)
    assert pack(resumed.state_dict())[0] == pack(optimizer.state_dict())[0]


@every_row
def test_learning_rate_of_the_groups_acts(row, model):
    """Schedules write it there; at zero nothing moves, after a load as before."""
    optimizer = build_optimizer(configured(row, weight_decay=0.1), model)
    losses(model, optimizer, 3)
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    averaged = row in AVERAGED  # there z stays, and what lies between it and the average comes nearer
    moving = [optimizer.state[p]["z"] if averaged else p.detach() for p in model.parameters()]
    before = [p.clone() for p in moving]
    losses(model, optimizer, 1)
    assert all(torch.equal(p, old) for p, old in zip(moving, before, strict=True))


@every_row
def test_every_parameter_moves(row, model):
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = build_optimizer(configured(row), model)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(before)
    losses(model, optimizer, 3)
    moved = {name: not torch.equal(p, old) for (name, p), old in zip(model.named_parameters(), before, strict=True)}
    for name in ROUNDING_ERRORS:
        moved.pop(name)
    assert all(moved.values()), moved


@every_row
def test_weight_decay_pulls_to_zero(row, model):
    """Without a gradient: once for the decay apart from it, by the factor 1−lr·w; nothing moves without decay."""
    start = [p.detach().clone() for p in model.parameters()]
    for decay in (0.0, 0.5):
        optimizer = build_optimizer(configured(row, lr=0.1, weight_decay=decay), model)

        def none():
            for p in model.parameters():
                p.grad = torch.zeros_like(p)

        for _ in range(2):
            none()
            optimizer.step(none) if second_gradient(optimizer) else optimizer.step()
        for p, old in zip(model.parameters(), start, strict=True):
            if decay == 0:
                assert torch.equal(p, old)
            elif row in COUPLED:
                assert (p.abs() <= old.abs() + 0.21).all()
                assert p.norm() < old.norm() or old.norm() == 0
            elif row == "soap":  # its first step only measures
                torch.testing.assert_close(p.detach(), old * 0.95)
            elif row not in AVERAGED:
                torch.testing.assert_close(p.detach(), old * 0.95**2)
            else:
                assert p.norm() < old.norm() or old.norm() == 0


@every_row
def test_clipped_gradients_are_what_it_uses(row, model):
    """A gradient clipped to nothing leaves a step of SGD nothing; all take a clipped one without complaint."""
    optimizer = build_optimizer(configured(row), model)
    before = [p.detach().clone() for p in model.parameters()]
    losses(model, optimizer, 3, clip=1e-12)
    change = max(float((p.detach() - old).abs().max()) for p, old in zip(model.parameters(), before, strict=True))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    if row in {"sgd", "momentum", "nesterov", "sam on sgd", "schedule_free on sgd"}:
        assert change < 1e-7


@every_row
def test_what_the_loop_asks(row, model):
    optimizer = build_optimizer(configured(row), model)
    assert second_gradient(optimizer) == (row in TWO_GRADIENTS)
    assert keeps_an_average(optimizer) == (row in AVERAGED)


@pytest.mark.parametrize("row", ["adamw", *sorted(AVERAGED)])
def test_evaluating_changes_nothing(row, model):
    optimizer = build_optimizer(configured(row), model)
    losses(model, optimizer, 4)
    before = [p.detach().clone() for p in model.parameters()]
    state = pack(optimizer.state_dict())
    changed = []

    def interrupted():
        with evaluating(optimizer):
            assert pack(optimizer.state_dict())[0] == state[0]
            changed.extend(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert any(changed) == (row in AVERAGED)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    with evaluating(optimizer):
        again = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert again == changed


def test_long_sides_are_not_decomposed(monkeypatch):
    net = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 30))
    monkeypatch.setattr(optimizers, "LONGEST_SHAMPOO", 20)
    monkeypatch.setattr(optimizers, "LONGEST_SOAP", 20)
    shampoo, soap = (build_optimizer(configured(row), net) for row in ("shampoo", "soap"))
    for optimizer in (shampoo, soap):
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert [[tuple(p.shape) for p in group["params"]] for group in shampoo.param_groups] == [
        [(3, 6), (3,)],
        [(30, 3), (30,)],
    ]
    assert set(shampoo.state[net[1].weight]) == {"step", "sum"}
    assert [len(side) for side in soap.state[net[1].weight]["GG"]] == [0, 3]


# Through Fabric, and in a run.


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_sam_takes_two_gradients_through_fabric(precision):
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    before = net.weight.detach().clone()
    model, optimizer = fabric.setup(net, build_optimizer(configured("sam on sgd", rho=10.0), net))
    points = []

    def gradient():
        points.append(net.weight.detach().clone())
        optimizer.zero_grad()
        fabric.backward(model(torch.ones(4, 3)).square().mean())

    gradient()
    optimizer.step(gradient)
    assert len(points) == 2
    assert second_gradient(optimizer)
    distance = float(((points[1] - points[0]) ** 2).sum()) ** 0.5
    assert 5 < distance <= 10  # the bias has its share
    assert not torch.equal(net.weight, before)


def test_schedule_free_evaluates_through_fabric():
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    net = nn.Linear(3, 2)
    model, optimizer = fabric.setup(net, build_optimizer(configured("schedule_free on adamw"), net))
    for _ in range(3):
        optimizer.zero_grad()
        fabric.backward(model(torch.ones(4, 3)).square().mean())
        optimizer.step()
    trained = net.weight.detach().clone()
    with evaluating(optimizer):
        assert not torch.equal(net.weight, trained)
    assert torch.equal(net.weight, trained)


@pytest.mark.parametrize("name", ["schedule_free", "talt"])
def test_a_stopped_run_goes_on_bit_for_bit(name, tmp_path):
    """Schedule-free: checkpoints hold the average, which is judged, and the weights where gradients are taken.

    TALT: they hold its bases, and infinite thresholds.
    """
    optimizer = {"name": name}
    training = {"epochs": 9, "max_steps": 14, "eval_every": 4, "device": "cpu", "checkpoints": {"every": 3}}
    model = {"name": "mlp", "width": 8}
    config = make_config({"optimizer": optimizer, "training": training, "model": model, "dataset": {"batch_size": 32}})

    def stop(done, total, note):
        if done == 7:
            raise StopRequested

    straight = train(config, RunFolder.create(tmp_path / "straight"))
    stopped = train(config, RunFolder.create(tmp_path / "stopped"), progress=stop)
    assert stopped.final is None
    train(config, stopped, resume=True)
    assert same(load_run(straight.path).model, load_run(stopped.path).model)

    def told(folder):
        return [{k: v for k, v in row.items() if "second" not in k and "bytes" not in k} for row in folder.metrics()]

    assert told(straight) == told(stopped)


# Bad input.


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"name": "lion", "momentum": 0.9}, "optimizer: 'momentum' does nothing in lion: remove it"),
        ({"name": "sgd", "rho": 0.1}, "optimizer: 'rho' does nothing in sgd: remove it"),
        ({"name": "shampoo", "betas": [0.9, 0.9]}, "optimizer: 'betas' does nothing in shampoo: remove it"),
        ({"name": "momentum", "nesterov": True}, "optimizer: 'nesterov' does nothing in momentum: remove it"),
        ({"name": "adamw", "base": "adamw"}, "optimizer: 'base' does nothing in adamw: remove it"),
        (
            {"name": "sam", "base": "adamw", "momentum": 0.9},
            "optimizer: 'momentum' does nothing in sam on adamw: remove it",
        ),
        ({"name": "sam", "betas": [0.9, 0.9]}, "optimizer: 'betas' does nothing in sam on sgd: remove it"),
        ({"name": "nesterov", "momentum": 0}, "optimizer: 'nesterov' needs a momentum > 0"),
        (
            {"name": "schedule_free", "base": "sgd", "momentum": 0},
            "optimizer: schedule_free on sgd needs a momentum > 0",
        ),
        (
            {"name": "schedule_free", "betas": [0, 0.9]},
            "optimizer: schedule_free on adamw needs a first of the betas > 0",
        ),
        ({"name": "sam", "rho": -1}, "optimizer.rho: expected a number >= 0, got -1"),
        ({"name": "sam", "base": "lion"}, "optimizer.base: expected one of 'sgd', 'adamw', got 'lion'"),
        ({"name": "muon", "lr": 0}, "optimizer.lr: expected a number > 0, got 0"),
        ({"name": "talt", "momentum": 0.9}, "optimizer: 'momentum' does nothing in talt: remove it"),
        ({"name": "adamw", "talt": {}}, "optimizer: 'talt' does nothing in adamw: remove it"),
        ({"name": "talt", "talt": {"powr": 0}}, "optimizer.talt.powr: unknown key, did you mean 'power'?"),
        ({"name": "talt", "talt": {"nesterov": 1}}, "optimizer.talt.nesterov: expected true or false, got 1"),
        ({"name": "talt", "talt": {"power": 2}}, "optimizer.talt: power: expected 0 to 1, got 2.0"),
        ({"name": "talt", "talt": {"clip": 0.5}}, "optimizer.talt: clip: expected a number >= 1, got 0.5"),
        ({"name": "talt", "talt": 3}, "optimizer.talt: expected a mapping, got 3"),
        ({"name": ["sgd"]}, None),
        ({"name": "sam", "base": 3}, "optimizer.base: expected one of 'sgd', 'adamw', got 3"),
    ],
)
def test_bad_settings_are_one_line(values, expected):
    with pytest.raises(ValueError, match="optimizer") as caught:
        make_config({"optimizer": values})
    if expected is not None:
        assert str(caught.value) == f"configuration: {expected}"
    assert "\n" not in str(caught.value)


def test_defaults_of_the_row_are_written_and_read_again():
    for row in ROWS:
        config = make_config({"optimizer": configured(row).model_dump(mode="json")})
        assert config.optimizer == configured(row)
        assert (config.optimizer.talt is not None) == (row == "talt")
        assert {key: getattr(config.optimizer, key) for key in ROWS[row]} == ROWS[row]
    assert make_config({"optimizer": {"name": "talt", "talt": None}}).optimizer == configured("talt")
    assert make_config({"optimizer": {"name": "lion"}}).model_dump(mode="json")["optimizer"]["betas"] == [0.9, 0.99]


def test_another_optimizer_starts_from_its_own_defaults():
    base = make_config({"optimizer": {"name": "nesterov", "lr": 0.2, "momentum": 0.7, "weight_decay": 0.1}})
    assert apply(base, {"optimizer.name": "lion"}).optimizer == configured("lion")
    assert apply(base, {"optimizer.name": "lion", "optimizer.lr": 0.1}).optimizer == configured("lion", lr=0.1)
    assert apply(base, {"optimizer.name": "nesterov", "optimizer.lr": 0.1}).optimizer.momentum == 0.7
    sam = make_config({"optimizer": {"name": "sam", "momentum": 0.7}})
    assert apply(sam, {"optimizer.base": "adamw"}).optimizer == configured("sam on adamw")


def test_tables_have_the_same_rows():
    assert {row_of(name, None) for name in OPTIMIZERS} <= set(ROWS)
    assert list(NAMES) == list(OPTIMIZERS)
    assert {row.partition(" on ")[0] for row in ROWS if " on " in row} == set(BASES)


def test_missing_or_old_library_is_one_clear_line(monkeypatch, model):
    monkeypatch.setattr(optimizers, "RequirementCache", lambda requirement: False)
    with pytest.raises(ValueError, match="pytorch_optimizer") as caught:
        build_optimizer(configured("lion"), model)
    version = metadata.version("pytorch_optimizer")
    command = "pip install 'pytorch_optimizer>=4.1,<5'"
    assert str(caught.value) == (
        f"optimizer.name: lion: expected pytorch_optimizer>=4.1,<5 installed, got version {version}; {command}"
    )

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(optimizers.metadata, "version", absent)
    with pytest.raises(ValueError, match="got no such package; pip install"):
        build_optimizer(configured("soap"), model)


def test_documented_defaults_are_those_of_the_rows():
    page = (Path(__file__).parents[1] / "docs" / "optimizers.md").read_text(encoding="utf-8")
    table = page.partition("## The table")[2].partition("Memory is")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| `")]
    assert [cell[0].strip("`") for cell in cells] == [*OPTIMIZERS, OWN]
    assert float(cells[-1][3]) == ROWS[OWN]["lr"]
    for name, _, settings, rate, _, _ in cells[:-1]:
        row = ROWS[row_of(name.strip("`"), None)]
        assert float(rate.split(";")[0]) == row["lr"]
        for key in row.keys() - {"lr"}:
            value = row[key]
            text = ", ".join(f"{number:g}" for number in value) if isinstance(value, tuple) else f"{value:g}"
            assert f"`{key}` {str(value).lower() if isinstance(value, bool) else text}" in settings
