"""The specification found by tracing: equal to ones written by hand; what cannot be followed stays or is refused."""

import importlib.util

import numpy as np
import pytest
import torch
from torch import nn

from alignment_nets import NETS, net_risk
from cases import classes, gen, normal, paired, seeded
from losslab.operators.risk import EmpiricalRisk
from losslab.probes.permutations import layer_rules, tracing
from losslab.probes.permutations.permutations import PermutationSpec
from losslab.probes.permutations.tracing import permutation_spec
from losslab.studies import vision
from losslab.studies.models import build_model
from losslab.studies.sections import ModelConfig
from untouched import assert_untouched

LETTERS = "ABCDEFGHIJKLMNOP"


def written(spec: PermutationSpec) -> dict[str, list[str]]:
    """Each parameter's axes: a letter for a group's units, a number for entries in place, · in a product, + in sums."""

    def text(axis) -> str:
        return "+".join("·".join(str(f.size) if f.group is None else LETTERS[f.group] for f in s) for s in axis)

    return {name: [text(axis) for axis in layout] for name, layout in spec.layouts.items()}


HAND = {
    "MLP": {
        "0.weight": ["A", "4"], "0.bias": ["A"], "2.weight": ["B", "A"], "2.bias": ["B"],
        "4.weight": ["3", "B"], "4.bias": ["3"],
    },
    "conv and BatchNorm": {
        "0.weight": ["A", "1", "3", "3"], "0.bias": ["A"],
        "1.weight": ["A"], "1.bias": ["A"], "1.running_mean": ["A"], "1.running_var": ["A"],
        "3.weight": ["B", "A", "3", "3"],
        "4.weight": ["B"], "4.bias": ["B"], "4.running_mean": ["B"], "4.running_var": ["B"],
        "8.weight": ["3", "B"], "8.bias": ["3"],
    },
    "flatten": {
        "0.weight": ["A", "1", "3", "3"], "0.bias": ["A"], "4.weight": ["B", "A·4"], "4.bias": ["B"],
        "6.weight": ["3", "B"], "6.bias": ["3"],
    },
    "residual": {
        "stem.0.weight": ["A", "1", "3", "3"],
        **{f"stem.1.{part}": ["A"] for part in ("weight", "bias", "running_mean", "running_var")},
        **{f"blocks.{i}.0.weight": [letter, "A", "3", "3"] for i, letter in enumerate("BC")},
        **{f"blocks.{i}.0.bias": [letter] for i, letter in enumerate("BC")},
        **{
            f"blocks.{i}.1.{part}": [letter]
            for i, letter in enumerate("BC") for part in ("weight", "bias", "running_mean", "running_var")
        },
        **{f"blocks.{i}.3.weight": ["A", letter, "3", "3"] for i, letter in enumerate("BC")},
        **{f"blocks.{i}.3.bias": ["A"] for i in range(2)},
        "down.weight": ["D", "A", "3", "3"], "down.bias": ["D"], "shortcut.weight": ["D", "A", "3", "3"],
        "head.weight": ["3", "D"], "head.bias": ["3"],
    },
    # A: the residual stream; B: heads; C: hidden units; D and E: a head's coordinates for q and k, and for v.
    "attention": {
        "embedding.weight": ["7", "A"], "norm.weight": ["A"], "norm.bias": ["A"],
        "q.weight": ["B·D", "A"], "q.bias": ["B·D"], "k.weight": ["B·D", "A"], "k.bias": ["B·D"],
        "v.weight": ["B·E", "A"], "v.bias": ["B·E"], "out.weight": ["A", "B·E"], "out.bias": ["A"],
        "up.weight": ["C", "A"], "up.bias": ["C"], "down.weight": ["A", "C"], "down.bias": ["A"],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", HAND)
def test_specification_equals_the_one_written_by_hand(name):
    assert written(permutation_spec(net_risk(name))) == HAND[name]


def test_a_heads_coordinates_stay_in_their_head():
    spec = permutation_spec(net_risk("attention"))
    assert [group.within for group in spec.groups] == [None, None, None, 1, 1]
    assert [group.size for group in spec.groups] == [6, 2, 8, 3, 3]


def test_groups_of_channels():
    """GroupNorm's two groups hold two of the convolution's four groups each, and those two channels each."""
    layouts = written(permutation_spec(net_risk("grouped")))
    spec = permutation_spec(net_risk("grouped"))
    assert layouts["norm.weight"] == layouts["first.bias"]
    assert layouts["gate.weight"][1] == "+".join([layouts["norm.weight"][0], layouts["depthwise.weight"][0]])
    assert layouts["gate.weight"][0] == "+".join(2 * [layouts["head.weight"][1]])
    assert len(spec.groups) >= 4
    assert not spec.unknown


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
def test_any_permutation_leaves_the_function(name, dtype, tolerance):
    risk = net_risk(name, dtype)
    spec, state = permutation_spec(risk), {k: v.clone() for k, v in risk.model.state_dict().items()}
    order = spec.random(np.random.default_rng(3))
    assert all(moved for moved, group in zip(spec.moved(order), spec.groups, strict=True) if group.size > 3)
    shuffled = spec.apply(state, order)
    with torch.no_grad(), risk.evaluating():
        for batch, _ in risk.read():
            expected = risk.output({}, batch)
            assert torch.allclose(risk.output({k: shuffled[k] for k in spec.layouts}, batch), expected, atol=tolerance)


@pytest.mark.parametrize("name", ["simple_cnn", "simple_cnn with BatchNorm", "mlp"])
def test_our_own_models(name):
    config = ModelConfig(name=name.split()[0], width=4, hidden=2, batch_norm="BatchNorm" in name)
    model = build_model(config, (1, 8, 8), 3).double()
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), [(normal(4, 1, 8, 8), classes(4))], check=False)
    spec = permutation_spec(risk)
    assert [group.size for group in spec.groups] == ([4, 4] if name == "mlp" else [4, 4, 8, 32])
    assert not spec.unknown


def test_touches_nothing():
    risk = net_risk("residual")
    with assert_untouched(risk.model):
        permutation_spec(risk)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 5), Switch(), nn.Linear(5, 3))

    def forward(self, x):
        return self.inner(x)


class Switch(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def risk_of(model: nn.Module, inputs: int = 4) -> EmpiricalRisk:
    return paired(model, nn.CrossEntropyLoss(), normal(6, inputs), classes(6), [4, 2]).risk(check=False)


def test_data_dependent_control_flow_is_refused_by_the_modules_name():
    with pytest.raises(ValueError, match=r"reads a tensor's values \(inner.1: aten::"):
        permutation_spec(risk_of(seeded(Branching)))


class OutOfSight(nn.Module):
    """Goes a way that torch's dispatcher does not see."""

    def forward(self, x):
        return x * torch.from_numpy(x.detach().numpy().cumsum(-1))


def test_tensors_made_by_other_means_keep_their_order():
    layers = [nn.Linear(4, 5), OutOfSight(), nn.Linear(5, 3)]
    assert not permutation_spec(risk_of(seeded(lambda: nn.Sequential(*layers)))).groups


def test_a_wrong_rule_is_found_out(monkeypatch):
    class Ordered(nn.Module):
        def forward(self, x):
            return x.cumsum(-1)

    layers = [nn.Linear(4, 5), Ordered(), nn.Linear(5, 3)]
    risk = risk_of(seeded(lambda: nn.Sequential(*layers)))
    assert not permutation_spec(risk).groups
    monkeypatch.setitem(tracing.RULES, "cumsum", layer_rules.pointwise)
    with pytest.raises(ValueError, match=r"expected a function that stays the same .* changes by"):
        permutation_spec(risk)


class Strange(nn.Module):
    """An operation without a rule between two layers."""

    def forward(self, x):
        return torch.as_strided(x, x.shape, x.stride())


def test_what_is_not_understood_keeps_its_place_and_is_named():
    layers = [nn.Linear(4, 5), Strange(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)]
    spec = permutation_spec(risk_of(seeded(lambda: nn.Sequential(*layers))))
    assert spec.unknown == ("1: aten::as_strided",)
    assert [group.name for group in spec.groups] == ["2.weight:0"]


@pytest.mark.parametrize("pad", [(1, 1), (0, 2)])
def test_channels_of_zeros_beside_a_stream(pad):
    """The parameter-free shortcut of the first ResNets: the padded channels stay, the stream's own move."""

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.head = nn.Linear(4, 5), nn.Linear(5, 7), nn.Linear(7, 3)

        def forward(self, x):
            x = torch.tanh(self.first(x))
            return self.head(nn.functional.pad(x, pad) + self.second(x))

    layouts = written(permutation_spec(risk_of(seeded(Padded))))
    assert layouts["head.weight"][1] == "+".join(p for p in (str(pad[0]) * (pad[0] > 0), "A", str(pad[1])) if p)


def test_parameters_the_risk_does_not_choose_stay():
    spec = permutation_spec(risk_of(seeded(NETS["MLP"][0])).restrict(["2.*", "4.*"]))
    assert written(spec) == {"2.weight": ["A", "6"], "2.bias": ["A"], "4.weight": ["3", "A"], "4.bias": ["3"]}


def test_unused_parameters_and_tied_weights():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.idle = nn.Linear(4, 5, bias=False), nn.Linear(5, 5)

        def forward(self, x):
            return nn.functional.linear(torch.tanh(self.encoder(x)), self.encoder.weight.T)[:, :3]

    spec = permutation_spec(risk_of(seeded(Odd)))
    assert written(spec) == {"encoder.weight": ["A", "3+1"], "idle.weight": ["5", "5"], "idle.bias": ["5"]}


def test_resnet18():
    """Four residual streams, and one group within each of the eight blocks."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is optional, and not installed")
    model = vision.torchvision().models.resnet18(num_classes=3)
    images = torch.randn(1, 3, 32, 32, generator=gen(0))
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), [(images, classes(1))], check=False)
    spec = permutation_spec(risk)
    layouts = written(spec)
    sizes = {group.name: group.size for group in spec.groups}
    streams = {layouts[f"layer{i}.{block}.conv2.weight"][0] for i in range(1, 5) for block in range(2)}
    assert len(streams) == 4
    assert len(sizes) == 4 + 8
    assert layouts["conv1.weight"][0] == layouts["layer1.0.conv2.weight"][0] == layouts["layer1.1.conv2.weight"][0]
    for i, width in enumerate((64, 128, 256, 512), 1):
        for block in range(2):
            inner = layouts[f"layer{i}.{block}.conv1.weight"][0]
            assert layouts[f"layer{i}.{block}.conv2.weight"][1] == inner
            assert layouts[f"layer{i}.{block}.bn1.running_var"] == [inner]
            assert sizes[f"layer{i}.{block}.conv1.weight:0"] == width
        if i > 1:
            down = layouts[f"layer{i}.0.downsample.0.weight"]
            assert down[:2] == [layouts[f"layer{i}.0.conv2.weight"][0], layouts[f"layer{i - 1}.0.conv2.weight"][0]]
    assert layouts["fc.weight"] == ["3", layouts["layer4.1.conv2.weight"][0]]


class Squeezed(nn.Module):
    """An axis of one that comes and goes; a squeeze of a longer axis does nothing."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.second(self.first(x).relu().unsqueeze(1).squeeze(1).squeeze(1))


def test_squeezed_axes_are_followed():
    spec = permutation_spec(paired(seeded(Squeezed), nn.CrossEntropyLoss(), normal(5, 4), classes(5), [3, 2]).risk())
    assert [group.size for group in spec.groups] == [6]
    assert not spec.unknown
