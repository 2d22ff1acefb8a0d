"""ParameterSpace: the parameters as one vector, and back."""

import re

import pytest
import torch
from torch import nn

from cases import Tied, Unused, conv_batchnorm, mlp, normal, seeded
from filters import filter_norms
from losslab.params import ParameterSpace


@pytest.fixture
def model() -> nn.Module:
    return seeded(conv_batchnorm)


def assorted() -> nn.Module:
    """Every shape that the definition of a filter distinguishes."""
    return nn.ModuleDict(
        {
            "linear": nn.Linear(4, 3),
            "conv": nn.Conv2d(2, 3, (2, 3)),
            "depthwise": nn.Conv2d(4, 4, 1, groups=4),
            "embedding": nn.Embedding(5, 2),
            "norm": nn.LayerNorm(4),
            "column": nn.Linear(1, 6),
            "row": nn.Linear(6, 1),
        }
    )


def test_order_and_sizes_are_those_of_named_parameters(model):
    space = ParameterSpace(model)
    assert space.names == tuple(name for name, _ in model.named_parameters())
    assert space.shapes == tuple(p.shape for p in model.parameters())
    assert space.size == sum(p.numel() for p in model.parameters())
    assert torch.equal(space.vector(), nn.utils.parameters_to_vector(model.parameters()))
    assert (space.device, space.dtype) == (torch.device("cpu"), torch.float32)


def test_vector_is_a_copy(model):
    space = ParameterSpace(model)
    space.vector().zero_()
    assert float(space.vector().abs().sum()) > 0


def test_vector_of_a_single_tensor_is_a_copy_too(model):
    space = ParameterSpace(model, "0.weight")
    space.vector().zero_()
    assert float(space.vector().abs().sum()) > 0


def test_views_share_memory(model):
    space = ParameterSpace(model)
    vector = torch.arange(float(space.size))
    views = space.named_views(vector)
    assert {v.untyped_storage().data_ptr() for v in views.values()} == {vector.untyped_storage().data_ptr()}
    views["5.weight"][0, 0] = -7.0
    assert (vector == -7.0).sum() == 1
    assert torch.equal(torch.cat([v.flatten() for v in views.values()]), vector)


def test_views_of_a_strided_column_share_memory(model):
    space = ParameterSpace(model)
    matrix = torch.arange(3.0 * space.size).view(space.size, 3)
    space.views(matrix[:, 1])[0].fill_(-1.0)
    assert (matrix == -1.0).nonzero()[:, 1].unique().tolist() == [1]


def test_assign_and_vector_round_trip(model):
    space = ParameterSpace(model)
    pointers = [p.data_ptr() for p in model.parameters()]
    vector = normal(space.size).float()
    space.assign(vector)
    assert torch.equal(space.vector(), vector)
    assert torch.equal(model[5].bias, vector[-3:])
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert all(p.is_leaf and p.requires_grad for p in model.parameters())


def test_assign_copies_what_it_is_given(model):
    space = ParameterSpace(model)
    vector = normal(space.size).float()
    space.assign(vector)
    vector.zero_()
    assert float(space.vector().abs().sum()) > 0


def test_channels_last_weights_keep_their_logical_order():
    conv = nn.Conv2d(3, 4, 2)
    expected = ParameterSpace(conv).vector()
    space = ParameterSpace(conv.to(memory_format=torch.channels_last))
    assert torch.equal(space.vector(), expected)
    space.assign(2 * expected)
    assert torch.equal(conv.weight.detach().contiguous().flatten(), 2 * expected[:-4])


@pytest.mark.parametrize("pattern", ["second.weight", "second*"])
def test_a_pattern_of_a_tied_weights_other_name_is_told_the_first(pattern):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight
            self.head = nn.Linear(4, 2)

    message = f"params: {pattern!r} matches 'second.weight', which is tied to 'first.weight'"
    with pytest.raises(ValueError, match=re.escape(message) + ".*pass 'first.weight'"):
        ParameterSpace(Twice(), pattern)
    with pytest.raises(ValueError, match="no trainable parameter matches 'third"):
        ParameterSpace(Twice(), "third*")
    frozen = Twice()
    frozen.first.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter matches 'second"):
        ParameterSpace(frozen, pattern)


def test_tied_weights_count_once():
    model = seeded(Tied)
    space = ParameterSpace(model)
    assert space.names == ("encoder.weight",)
    assert space.size == 16
    space.assign(torch.zeros(16))
    assert not model.decoder.weight.any()


def test_frozen_and_empty_parameters_are_left_out(model):
    model[0].weight.requires_grad_(False)
    model.register_parameter("empty", nn.Parameter(torch.zeros(0)))
    names = ParameterSpace(model).names
    assert "0.weight" not in names
    assert "empty" not in names
    assert "0.bias" in names


@pytest.mark.parametrize(
    ("select", "names"),
    [
        ("5.*", ("5.weight", "5.bias")),
        ("*.bias", ("0.bias", "1.bias", "5.bias")),
        (["5.bias", "0.*"], ("0.weight", "0.bias", "5.bias")),  # the module's order, not the patterns'
        (("*.bias", "5.*"), ("0.bias", "1.bias", "5.weight", "5.bias")),  # each once
        ("[05].bias", ("0.bias", "5.bias")),
    ],
)
def test_selection_by_glob(model, select, names):
    space = ParameterSpace(model, select)
    assert space.names == names
    assert space.size == sum(dict(model.named_parameters())[name].numel() for name in names)


@pytest.mark.parametrize("select", ["layer4.*", ["5.*", "layer4.*"], "5", "5.WEIGHT"])
def test_selection_without_a_match_names_the_known_ones(model, select):
    with pytest.raises(ValueError, match=r"no trainable parameter matches .*there are 0\.weight, 0\.bias, 1\.weight"):
        ParameterSpace(model, select)


def test_empty_selection_is_an_error(model):
    with pytest.raises(ValueError, match=r"at least one name or pattern.*0\.weight"):
        ParameterSpace(model, [])


def test_selecting_a_frozen_parameter_is_an_error(model):
    model[5].requires_grad_(False)
    with pytest.raises(ValueError, match=r"no trainable parameter matches '5\.\*'"):
        ParameterSpace(model, "5.*")


def test_nothing_trainable(model):
    with pytest.raises(ValueError, match="requires_grad=True, got none"):
        ParameterSpace(model.requires_grad_(False))
    with pytest.raises(ValueError, match="requires_grad=True, got none"):
        ParameterSpace(nn.ReLU())


def test_mixed_kinds_are_refused_unless_left_out(model):
    model[5].double()
    with pytest.raises(ValueError, match=r"one dtype .*torch\.float32.*torch\.float64"):
        ParameterSpace(model)
    assert ParameterSpace(model, "5.*").dtype == torch.float64
    model[5].float().to("meta")
    with pytest.raises(ValueError, match=r"one device .*cpu.*meta"):
        ParameterSpace(model)


def test_kind_follows_the_module():
    model = mlp()
    space = ParameterSpace(model)
    model.bfloat16()
    assert space.dtype == space.vector().dtype == torch.bfloat16


def test_flatten_puts_zeros_for_unused_parameters():
    space = ParameterSpace(seeded(Unused))
    named = zip(space.names, space.shapes, strict=True)
    pieces = [None if name == "idle" else torch.ones(shape) for name, shape in named]
    vector = space.flatten(pieces)
    assert vector.shape == (space.size,)
    assert torch.equal(space.named_views(vector)["idle"], torch.zeros(2))
    assert float(vector.sum()) == space.size - 2
    with pytest.raises(ValueError, match="zip"):
        space.flatten(pieces[:-1])


def test_filters_against_a_plain_loop():
    space = ParameterSpace(assorted())
    vector = normal(space.size).float()
    expected = []
    for view in space.views(vector):
        if view.ndim < 2:
            continue
        filters = [view] if view[0].numel() == 1 else list(view)
        expected.append(torch.stack([f.norm() for f in filters]))
    got = filter_norms(space, vector)
    assert [len(g) for g in got] == [len(e) for e in expected] == [3, 3, 1, 5, 1, 1]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_filters_tile_exactly_the_tensors_of_two_or_more_dimensions():
    space = ParameterSpace(assorted())
    covered = torch.zeros(space.size)
    for filters in space.filters(covered):
        filters.add_(1)
    for name, view in space.named_views(covered).items():
        dimensions = dict(space.module.named_parameters())[name].ndim
        assert view.unique().tolist() == [1.0 if dimensions >= 2 else 0.0], name


@pytest.mark.parametrize("groups", [1, 2])
def test_filters_of_transposed_convolutions_lead_into_one_output(groups):
    """Moving one filter moves one output channel, and no other."""
    layer = seeded(lambda: nn.ConvTranspose2d(4, 6, (3, 2), groups=groups)).double()
    space, x = ParameterSpace(layer, "weight"), normal(2, 4, 5, 5)
    (norms,) = filter_norms(space, space.vector())
    assert len(norms) == 6
    before = layer(x)
    for channel in range(6):
        vector = space.vector()
        (filters,) = space.filters(vector)
        assert filters.shape == (groups, 6 // groups, 4 // groups, 6)
        filters[channel // (6 // groups), channel % (6 // groups)] += 1
        after = torch.func.functional_call(layer, {"weight": vector.view(layer.weight.shape)}, (x,))
        changed = (after - before).abs().amax(dim=(0, 2, 3)) > 1e-9
        assert changed.nonzero().flatten().tolist() == [channel]


class Conv1D(nn.Module):
    """GPT-2's linear layer, as transformers writes it: (inputs, outputs)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(6.0).reshape(2, 3))


def test_filters_of_fused_embedded_and_transposed_weights():
    """Fused queries, keys and values have a filter for each of their rows; GPT-2's layers one for each column."""
    fused = seeded(lambda: nn.MultiheadAttention(4, 2))
    space = ParameterSpace(fused, "in_proj_weight")
    (norms,) = filter_norms(space, space.vector())
    torch.testing.assert_close(norms, fused.in_proj_weight.detach().norm(dim=1))
    assert len(norms) == 12
    space = ParameterSpace(Conv1D())
    torch.testing.assert_close(filter_norms(space, space.vector())[0], torch.tensor([9.0, 17.0, 29.0]).sqrt())
    space = ParameterSpace(nn.Embedding(7, 3))
    assert len(filter_norms(space, space.vector())[0]) == 7
    space = ParameterSpace(nn.LSTM(3, 2))  # four gates of two units
    assert [len(norms) for norms in filter_norms(space, space.vector())] == [8, 8]


def test_norm_is_taken_in_double_precision():
    model = nn.Linear(1000, 1000, bias=False).bfloat16()
    assert ParameterSpace(model).norm() == pytest.approx(float(model.weight.detach().double().norm()), rel=1e-12)


def test_vector_of_module_state_dict_and_vector():
    space, other = ParameterSpace(seeded(conv_batchnorm)), conv_batchnorm()
    expected = nn.utils.parameters_to_vector(other.parameters()).detach()
    state = other.state_dict()
    assert torch.equal(space.vector_of(other), expected)
    assert torch.equal(space.vector_of(state), expected)  # buffers in it are passed over
    assert torch.equal(space.vector_of(expected), expected)
    assert torch.equal(space.vector_of(other.double()), expected)
    assert space.vector_of(expected.double()).dtype == torch.float32
    assert not space.vector_of(other.float()).requires_grad
    assert torch.equal(space.vector_of(torch.compile(other, backend="eager")), expected)


def test_vector_of_takes_only_the_chosen_parameters():
    model = seeded(conv_batchnorm)
    assert torch.equal(ParameterSpace(model, "5.bias").vector_of({"5.bias": torch.ones(3)}), torch.ones(3))


def test_vector_of_errors(model):
    space = ParameterSpace(model)
    state = dict(model.state_dict())
    with pytest.raises(ValueError, match=r"end: expected '0\.weight' of shape \(2, 1, 3, 3\), got \(5, 4\)"):
        space.vector_of(mlp(), "end")
    with pytest.raises(ValueError, match=r"expected '5\.bias' of shape \(3,\), got \(4,\)"):
        space.vector_of(state | {"5.bias": torch.zeros(4)})
    with pytest.raises(ValueError, match=r"expected '5\.bias' of shape \(3,\), got nothing"):
        space.vector_of({k: v for k, v in state.items() if k != "5.bias"})
    with pytest.raises(ValueError, match=rf"vector: expected a tensor of shape \({space.size},\).*got \(2,\)"):
        space.vector_of(torch.zeros(2))
    with pytest.raises(TypeError, match="expected a module, its state dict or a vector, got NoneType"):
        space.vector_of(None)


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(33, 1), [0.0] * 33, None, torch.zeros(())])
def test_assign_refuses_other_shapes_and_writes_nothing(model, bad):
    space = ParameterSpace(model)
    before = space.vector()
    with pytest.raises(ValueError, match=r"vector: expected a tensor of shape"):
        space.assign(bad)
    assert torch.equal(space.vector(), before)
