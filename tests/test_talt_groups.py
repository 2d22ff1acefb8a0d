"""Which parameters TALT works on in their eigenspace: matrices and kernels but embeddings, with their names."""

import pytest
import torch
from torch import nn

from losslab.optim import TALT, ImprovedTALTOptimizer, talt_param_groups
from losslab.optim.groups import excluded, hidden_matrices
from losslab.studies.config import make_config
from losslab.studies.optimizers import build_optimizer


class Text(nn.Module):
    """A table, a kernel, a recurrent layer, an attention, a transposed kernel, a gain, a token of its own, a head."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.kernel = nn.Conv1d(4, 4, 3)
        self.back = nn.ConvTranspose1d(4, 4, 3)
        self.recurrent = nn.LSTM(4, 4, bias=False)
        self.attention = nn.MultiheadAttention(4, 2, bias=False)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7)


HIDDEN = [
    "kernel.weight",
    "recurrent.weight_ih_l0",
    "recurrent.weight_hh_l0",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
]


@pytest.fixture
def text():
    torch.manual_seed(0)
    return Text()


def names(group):
    return [name for name, _ in group["params"]]


@pytest.mark.parametrize(
    ("exclude", "more"),
    [
        (("embedding", "head"), []),
        (["head"], ["table.weight"]),
        ({"embedding"}, ["head.weight"]),
        ((), ["table.weight", "head.weight"]),
    ],
)
def test_hidden_matrices_have_the_optimizers_structure_and_the_rest_is_diagonal(text, exclude, more):
    rotated, diagonal = talt_param_groups(text, exclude)
    everything = dict(text.named_parameters())
    assert sorted(names(rotated)) == sorted([*HIDDEN, *more])
    assert sorted([*names(rotated), *names(diagonal)]) == sorted(everything)
    assert "structure" not in rotated
    assert diagonal["structure"] == "diagonal"
    assert all(everything[name] is parameter for name, parameter in [*rotated["params"], *diagonal["params"]])


def test_talt_takes_them_with_their_names(text):
    optimizer = TALT(talt_param_groups(text), structure="lowrank")
    rotated, diagonal = optimizer.param_groups
    assert (rotated["structure"], diagonal["structure"]) == ("lowrank", "diagonal")
    assert rotated["param_names"] == [*HIDDEN, "head.weight"]
    assert [p.shape for p in rotated["params"]][:2] == [(4, 4, 3), (16, 4)]


def test_a_tied_head_is_embedding_and_head_at_once(text):
    text.head = nn.Linear(4, 7, bias=False)
    text.head.weight = text.table.weight
    for exclude in ("embedding", "head"):
        assert "table.weight" not in names(talt_param_groups(text, (exclude,))[0])
    assert "table.weight" in names(talt_param_groups(text, ())[0])


def test_a_group_without_parameters_is_left_out():
    (only,) = talt_param_groups(nn.Linear(3, 2), ("head",))
    assert only["structure"] == "diagonal"
    (only,) = talt_param_groups(nn.Linear(3, 2, bias=False), ())
    assert "structure" not in only


@pytest.mark.parametrize(("exclude", "got"), [(("heads",), "'heads'"), ("head", "'head'")])
@pytest.mark.parametrize("function", [talt_param_groups, hidden_matrices])
def test_unknown_kinds_are_refused(function, exclude, got, text):
    with pytest.raises(ValueError, match=rf"^exclude: expected a tuple of 'embedding' and 'head'.*, got {got}$"):
        function(text, exclude)


@pytest.mark.parametrize("function", [talt_param_groups, hidden_matrices])
def test_a_lazy_module_without_shapes_is_refused(function):
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU())
    with pytest.raises(ValueError, match=r"^model: expected parameters with shapes, got a lazy module's; run a batch"):
        function(model)
    model(torch.zeros(2, 3))
    function(model, ())


def test_muons_direction_is_for_hidden_layers(text):
    assert [*map(excluded, ("polar", "auto"))] == [("embedding", "head"), ("embedding",)]
    settings = {"name": "talt", "lr": 0.1, "talt": {"structure": "polar"}}
    for talt in (
        build_optimizer(make_config({"optimizer": settings}).optimizer, text),
        ImprovedTALTOptimizer(text, torch.optim.SGD, lr=0.1, structure="polar").talt,
    ):
        rotated, diagonal = talt.param_groups
        assert "head.weight" not in rotated["param_names"]
        assert "head.weight" in diagonal["param_names"]


def test_parameters_in_place_of_the_model_are_refused_with_what_to_give(text):
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got generator; give the model"):
        talt_param_groups(text.parameters())
