"""EmpiricalRisk: one function of the parameters out of model, loss and data."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from cases import CASES, Case, Record, Tied, Unused, classes, mlp, normal, seeded, split
from losslab.operators.gradient_covariance import GradientCovariance
from losslab.operators.hessian import Hessian
from losslab.operators.risk import EmpiricalRisk
from untouched import assert_untouched

X, Y = normal(12, 4), classes(12)


@pytest.fixture
def model() -> nn.Module:
    return mlp().double()


@pytest.fixture(params=CASES, ids=str)
def case(request) -> Case:
    return CASES[request.param]()


def risk_of(model, batches=None, loss_fn=None, **kwargs) -> EmpiricalRisk:
    return EmpiricalRisk(model, loss_fn or nn.CrossEntropyLoss(), [(X, Y)] if batches is None else batches, **kwargs)


def plain(model, loss_fn=F.cross_entropy) -> tuple[float, torch.Tensor]:
    """Loss and gradient as anyone writes them."""
    loss = loss_fn(model(X), Y)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return float(loss.detach()), torch.cat([g.flatten() for g in grads])


# -- values


def test_equals_plain_torch_on_all_the_data(case):
    risk = case.risk()
    space = risk.space
    theta = space.vector() + 0.1 * normal(space.size, seed=4)
    for vector in (space.vector(), theta):
        with risk.at(vector):
            expected = float(case.whole(space.named_views(vector)).detach())
            assert risk.loss() == pytest.approx(expected, rel=1e-8)
            assert risk.evaluate().loss == pytest.approx(expected, rel=1e-8)
            torch.testing.assert_close(risk.gradient(), case.reference_gradient(risk), rtol=1e-8, atol=1e-12)
        assert risk.loss_at(vector) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("sizes", [[12], [1] * 12, [5, 7], [11, 1], [5, 0, 7], [0, 12], [12, 0]])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batch_sizes_and_reductions_do_not_matter(model, sizes, reduction):
    loss, gradient = plain(model)
    for loss_fn in (nn.CrossEntropyLoss(reduction=reduction), functools.partial(F.cross_entropy, reduction=reduction)):
        risk = risk_of(model, split(sizes, X, Y), loss_fn)
        assert risk.num_examples == 12
        assert risk.loss() == pytest.approx(loss, rel=1e-12)
        torch.testing.assert_close(risk.gradient(), gradient, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"num_workers": 0, "batch_size": 5}], ids=str)
def test_data_loaders(model, options):
    loss, gradient = plain(model)
    risk = risk_of(model, DataLoader(TensorDataset(X, Y), **({"batch_size": 4} | options)))
    assert risk.loss() == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(risk.gradient(), gradient, rtol=1e-10, atol=1e-14)


def test_unused_parameters_have_gradient_zero():
    risk = risk_of(seeded(Unused).double())
    views = risk.space.named_views(risk.gradient())
    assert not views["idle"].any()
    assert not views["offset"].any()
    assert views["body.weight"].any()
    only = risk_of(seeded(Unused).double(), params="idle")
    assert only.gradient().tolist() == [0.0, 0.0]
    assert only.loss() == pytest.approx(risk.loss())


def test_frozen_parameters_still_take_part(model):
    loss, gradient = plain(model)
    model[0].requires_grad_(False)
    risk = risk_of(model)
    assert risk.loss() == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(risk.gradient(), gradient[25:], rtol=1e-10, atol=1e-14)


def test_nothing_is_kept_for_parameters_that_are_not_chosen():
    deep = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(6)], nn.Linear(4, 3)).double()
    saved = []
    risk = risk_of(deep, params="6.*", check=False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        risk.gradient()
    assert len(saved) < 8  # the body of six layers alone would save 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_near_double(model, dtype):
    loss, gradient = plain(model)
    risk = risk_of(model.to(dtype), [(a.to(dtype), b) for a, b in split([5, 7], X, Y)])
    low = risk.gradient()
    assert (low.dtype, risk.dtype, risk.accumulation_dtype) == (dtype, dtype, torch.float32)
    tolerance = 1e-6 if dtype == torch.float32 else 3e-2
    assert risk.loss() == pytest.approx(loss, rel=tolerance)
    assert float((low.double() - gradient).norm() / gradient.norm()) < tolerance


def test_sums_over_many_batches_are_kept_in_more_than_bfloat16():
    model = nn.Linear(1, 1, bias=False).bfloat16()
    x = torch.ones(512, 1, dtype=torch.bfloat16)
    risk = EmpiricalRisk(model, lambda output, _: output.mean(), [(a, a) for a in x.split(1)])
    assert float(risk.gradient()) == pytest.approx(1, rel=1e-3)  # 512 terms of 2⁻⁹: a bfloat16 sum stops at 1/2


def test_count_examples_override():
    x, y = normal(5, 7, 4), classes(5, 7)  # time first: 7 sequences of 5 steps
    model = seeded(lambda: nn.Linear(4, 3)).double()
    risk = EmpiricalRisk(
        model,
        lambda output, target: F.cross_entropy(output.flatten(0, 1), target.flatten()),
        [(x[:, :2], y[:, :2]), (x[:, 2:], y[:, 2:])],
        count_examples=lambda batch: batch[1].shape[1],
    )
    assert risk.num_examples == 7
    expected = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    assert risk.loss() == pytest.approx(float(expected.detach()), rel=1e-12)


def test_counts_may_be_tensors(model):
    risk = risk_of(model, split([5, 7], X, Y), count_examples=lambda batch: (batch[1] >= 0).sum())
    assert type(risk.num_examples) is int
    assert risk.loss() == pytest.approx(plain(model)[0], rel=1e-12)


def test_loss_and_gradient_are_of_the_same_function_where_attention_has_a_fast_path():
    """Without gradients, torch's encoder layer zeroes padded positions: not the function that is differentiated."""

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1)
            self.head = nn.Linear(4, 3)

        def forward(self, x, mask):
            return self.head(self.encoder(x, src_key_padding_mask=mask).mean(1))

    model = seeded(Padded).double().eval()
    mask = torch.arange(5)[None] >= torch.tensor([5, 3, 2, 4])[:, None]
    was = torch.backends.mha.get_fastpath_enabled()
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), [(normal(4, 5, 4), mask, classes(4))])
    assert risk.loss() == pytest.approx(risk.evaluate().loss, rel=1e-12)
    assert torch.backends.mha.get_fastpath_enabled() is was is True


def test_compiled_models_are_unwrapped(model):
    loss, gradient = plain(model)
    risk = risk_of(torch.compile(model, backend="eager"))
    assert risk.model is model
    assert risk.space.names[0] == "0.weight"
    assert risk.loss() == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(risk.gradient(), gradient, rtol=1e-10, atol=1e-14)


# -- points


def test_loss_at_moves_neither_model_nor_vector(model):
    risk = risk_of(model)
    vector = normal(risk.space.size, seed=3)
    given = vector.clone()
    with assert_untouched(model):
        assert risk.loss_at(vector) != pytest.approx(risk.loss())
    assert torch.equal(vector, given)


def test_loss_at_leaves_the_vector_when_the_model_writes_its_weights():
    model = seeded(lambda: nn.Sequential(nn.Embedding(6, 4, max_norm=0.1), nn.Flatten(), nn.Linear(12, 3)))
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), [(classes(5, 3, num=6), classes(5))])
    vector = risk.space.vector()
    given = vector.clone()
    with assert_untouched(model):
        risk.loss_at(vector)
    assert torch.equal(vector, given)


def test_loss_at_takes_other_buffers():
    case = CASES["conv and BatchNorm"]()
    risk = case.risk()
    theta = risk.space.vector()
    buffers = {"1.running_var": torch.tensor([9.0, 9.0], dtype=torch.float64)}
    before = risk.loss()
    with assert_untouched(case.model):
        other = risk.loss_at(theta, buffers)
    case.model[1].running_var.fill_(9.0)
    assert other == pytest.approx(risk.loss(), rel=1e-12)
    assert other != pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_at_puts_everything_back(error):
    model = seeded(Tied).double()
    risk = EmpiricalRisk(model, nn.MSELoss(), [(X, X)])
    here, there = risk.space.vector(), normal(16, seed=2)
    pointer = model.encoder.weight.data_ptr()
    try:
        with risk.at(there) as same:
            assert same is risk
            assert torch.equal(model.decoder.weight.flatten(), there)
            if error:
                raise error
    except (ValueError, KeyboardInterrupt) as caught:
        assert error is type(caught)  # noqa: PT017
    assert torch.equal(risk.space.vector(), here)
    assert model.encoder.weight.data_ptr() == pointer
    assert model.decoder.weight is model.encoder.weight


def test_at_puts_back_when_interrupted_while_it_moves(model, monkeypatch):
    risk = risk_of(model)
    here, assign = risk.space.vector(), risk.space.assign

    def interrupted(vector):
        monkeypatch.setattr(risk.space, "assign", assign)
        with torch.no_grad():
            model[0].weight.zero_()
        raise KeyboardInterrupt

    monkeypatch.setattr(risk.space, "assign", interrupted)
    with pytest.raises(KeyboardInterrupt), risk.at(here + 1):
        pass
    assert torch.equal(risk.space.vector(), here)


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(43, 1), None])
def test_points_of_another_shape(model, bad):
    risk = risk_of(model)
    here = risk.space.vector()
    with pytest.raises(ValueError, match=r"vector: expected a tensor of shape \(43,\)"):
        risk.loss_at(bad)
    with pytest.raises(ValueError, match=r"vector: expected a tensor of shape \(43,\)"), risk.at(bad):
        pass
    assert torch.equal(risk.space.vector(), here)


# -- refusals


def test_no_trainable_parameter(model):
    with pytest.raises(ValueError, match="requires_grad=True, got none"):
        risk_of(model.requires_grad_(False))


@pytest.mark.parametrize(
    "batches", [[], [(X[:0], Y[:0])], DataLoader(TensorDataset(X, Y), batch_size=20, drop_last=True)]
)
def test_empty_data(model, batches):
    with pytest.raises(ValueError, match=r"at least one example, got none.*drop_last"):
        risk_of(model, batches)


def test_one_time_generators(model):
    with pytest.raises(ValueError, match=r"one-time generator; pass list\(batches\)"):
        risk_of(model, (batch for batch in [(X, Y)]))


@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss(reduction="none"), lambda output, _: output])
def test_losses_that_are_not_one_number(model, loss_fn):
    with pytest.raises(ValueError, match="loss_fn: expected"):
        risk_of(model, loss_fn=loss_fn)


def summed(output, target):
    return F.cross_entropy(output, target, reduction="sum")


def test_a_sum_that_is_not_stated_is_refused(model):
    with pytest.raises(ValueError, match=r"loss_fn: expected the mean .* got their sum: .*loss_fn\.reduction = 'sum'"):
        risk_of(model, loss_fn=summed)

    def stated(output, target):
        return summed(output, target)

    stated.reduction = "sum"
    assert risk_of(model, loss_fn=stated).loss() == pytest.approx(risk_of(model).loss(), rel=1e-6)


def test_a_model_that_returns_a_sum_is_refused():
    class Summing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x, labels):
            return {"loss": summed(self.layer(x), labels)}

    with pytest.raises(ValueError, match="got their sum"):
        EmpiricalRisk(Summing().double(), None, [{"x": normal(6, 4), "labels": classes(6)}])


def test_losses_that_are_neither_mean_nor_sum_are_taken(model):
    """A mean with a penalty, a loss of zero, and one that acts across the examples."""
    for loss_fn in (
        lambda output, target: F.cross_entropy(output, target) + 0.1,
        lambda output, target: 0 * output.sum(),
        lambda output, target: output.std(),
    ):
        risk_of(model, loss_fn=loss_fn)


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [(nn.CrossEntropyLoss, r"the class CrossEntropyLoss; make one: CrossEntropyLoss\(\)"), ("mse", "or None, got str")],
)
def test_what_is_no_loss_function(model, loss_fn, message):
    with pytest.raises(TypeError, match=f"loss_fn: expected a function.*{message}"):
        risk_of(model, loss_fn=loss_fn)


def test_what_is_no_module():
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got function"):
        EmpiricalRisk(lambda x: x, nn.MSELoss(), [(X, Y)])


def test_a_missing_loss(model):
    with pytest.raises(ValueError, match=r"must carry \.loss; it is a Tensor without"):
        EmpiricalRisk(model, None, [(X, Y)])


@pytest.mark.parametrize("memory", ["all", -1, 1e9, None, True])
def test_bad_graph_memory(model, memory):
    with pytest.raises(ValueError, match="graph_memory: expected 'auto' or a number of bytes"):
        risk_of(model, graph_memory=memory)


@pytest.mark.parametrize("mode", ["test", True, None])
def test_bad_mode(model, mode):
    with pytest.raises(ValueError, match="mode: expected 'eval' or 'train'"):
        risk_of(model, mode=mode)


@pytest.mark.parametrize("kind", [tuple, dict, Record])
def test_nan_in_the_data_names_the_batch(kind):
    class Any_(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3).double()

        def forward(self, x):
            return self.layer(x.x if isinstance(x, Record) else x)

    bad = X[7:].clone()
    bad[2, 1] = float("nan")
    pairs = [(X[:5], Y[:5]), (X[5:7], Y[5:7]), (bad, Y[7:])]
    make = {tuple: lambda x, y: (x, y), dict: lambda x, y: {"x": x, "y": y}, Record: Record}[kind]
    targets = {tuple: lambda t: t, dict: lambda t: t["y"], Record: lambda t: t.y}[kind]
    with pytest.raises(ValueError, match=r"got nan on batch 2; its data hold NaN or Inf"):
        EmpiricalRisk(Any_(), lambda o, t: F.cross_entropy(o, targets(t)), [make(x, y) for x, y in pairs])


def test_infinite_losses(model):
    def loss_fn(output, _):
        return output.sum() / 0

    with pytest.raises(
        ValueError, match=r"loss: .*got -?inf on batch 0; its data are finite, so the model or the loss"
    ):
        risk_of(model, loss_fn=loss_fn)
    risk = risk_of(model, loss_fn=loss_fn, check=False)
    assert abs(risk.loss()) == float("inf")  # a plane may pass through such points
    with pytest.raises(ValueError, match="on batch 0"):
        risk.gradient()


def test_a_gradient_that_is_not_finite_though_the_loss_is(model):
    with pytest.raises(ValueError, match="gradient: expected finite numbers on every batch, got nan on batch 0"):
        risk_of(model, loss_fn=lambda output, _: (0 * output).square().sum().sqrt())


def test_inference_mode_is_refused(model):
    """There, autograd gives gradients of zero without a word."""
    risk = risk_of(model)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference mode"):
        risk.gradient()
    with torch.no_grad():
        assert risk.gradient().any()


class Shrinking(Dataset):
    def __init__(self):
        self.length = 12

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return X[index], Y[index]


def test_data_that_change_their_length(model):
    data = Shrinking()
    risk = risk_of(model, DataLoader(data, batch_size=4))
    hessian = Hessian(risk_of(model, DataLoader(data, batch_size=4), graph_memory=0))
    data.length = 10
    for use in (risk.loss, risk.gradient, lambda: hessian @ torch.zeros(43)):
        with pytest.raises(ValueError, match=r"expected the same 12 examples on every pass, got 10"):
            use()


# -- touch nothing


class Interrupting(nn.Module):
    """Raises in the middle of its third forward pass after `armed`."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.0))
        self.head = nn.Linear(5, 3)
        self.calls_left = float("inf")

    def forward(self, x):
        h = self.body(x)
        self.calls_left -= 1
        if self.calls_left <= 0:
            torch.rand(2)
            raise KeyboardInterrupt
        return self.head(h)


class InterruptingBatches(list):
    """Raises when the third batch is asked for after `armed`."""

    armed = False

    def __iter__(self):
        for index, batch in enumerate(super().__iter__()):
            if self.armed and index == 2:
                torch.rand(2)
                raise KeyboardInterrupt
            yield batch


USES = {
    "loss": lambda risk: risk.loss(),
    "gradient": lambda risk: risk.gradient(),
    "Hessian": lambda risk: Hessian(risk) @ normal(risk.space.size),
    "GradientCovariance": lambda risk: GradientCovariance(risk, centred=False) @ normal(risk.space.size),
}


@pytest.mark.parametrize("where", ["model", "batches"])
@pytest.mark.parametrize(
    ("use", "mode"), [(use, "eval") for use in USES] + [(use, "train") for use in USES if use != "GradientCovariance"]
)
def test_interrupted_passes_touch_nothing(use, mode, where):
    model = seeded(Interrupting).double()
    batches = InterruptingBatches(split([4, 4, 4], X, Y))
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), batches, mode=mode)
    for graph_memory in ("auto", 0):
        risk.graph_memory = graph_memory
        with assert_untouched(model):
            USES[use](risk)
            if where == "model":
                model.calls_left = 3
            else:
                batches.armed = True
            with pytest.raises(KeyboardInterrupt):
                USES[use](risk)
        model.calls_left, batches.armed = float("inf"), False


@pytest.mark.parametrize("make", [Hessian, GradientCovariance])
def test_a_product_after_an_interrupted_one_is_right(make):
    model = seeded(Interrupting).double().eval()
    batches = InterruptingBatches(split([4, 4, 4], X, Y))
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), batches)
    operator, expected, v = make(risk), make(risk).to_dense(), normal(risk.space.size)
    batches.armed = True
    with pytest.raises(KeyboardInterrupt):
        operator @ v
    batches.armed = False
    for _ in range(2):
        torch.testing.assert_close(operator @ v, expected @ v, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("own_generator", [True, False])
def test_loaders_keep_their_random_state(model, own_generator):
    generator = torch.Generator().manual_seed(3) if own_generator else None
    loader = DataLoader(TensorDataset(X, Y), batch_size=5, shuffle=True, generator=generator)
    before = generator.get_state() if own_generator else torch.get_rng_state()
    with assert_untouched(model):
        inside = torch.get_rng_state()
        risk = risk_of(model, loader)
        risk.loss(), Hessian(risk) @ normal(43), GradientCovariance(risk) @ normal(43)
        assert torch.equal(torch.get_rng_state(), inside)
    if own_generator:
        assert torch.equal(generator.get_state(), before)


def test_repr(model):
    assert repr(risk_of(model)) == (
        "EmpiricalRisk(Sequential, 12 examples, ParameterSpace(43 entries in 4 tensors), mode='eval')"
    )


def test_class_weights_with_mean_are_refused():
    loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    x, y = normal(7, 4), classes(7)
    batches = split([3, 4], x, y)
    with pytest.raises(ValueError, match="class weights"):
        EmpiricalRisk(mlp().double(), loss_fn, batches)
    # Both remedies: the sum, and the mean over the weights.
    model = mlp().double()
    total = nn.CrossEntropyLoss(weight=loss_fn.weight, reduction="sum")
    assert EmpiricalRisk(model, total, batches).loss() == pytest.approx(float(total(model(x), y).detach()) / 7)
    weights = EmpiricalRisk(model, loss_fn, batches, count_examples=lambda b: int(loss_fn.weight[b[1]].sum()))
    assert weights.loss() == pytest.approx(float(loss_fn(model(x), y).detach()))


# -- other risks made of one


def test_a_copy_in_float64_is_the_exact_one_and_leaves_the_model_alone():
    net = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))).float().eval()
    loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]), reduction="sum")
    x, y = normal(7, 4).float(), classes(7)
    risk = EmpiricalRisk(net, loss_fn, split([3, 4], x, y))
    with assert_untouched(net):
        double = risk.to(torch.float64)
        gradient = double.gradient()
    twin = copy.deepcopy(net).double()
    exact = EmpiricalRisk(twin, copy.deepcopy(loss_fn).double(), split([3, 4], x.double(), y))
    assert double.dtype == gradient.dtype == torch.float64
    assert torch.equal(gradient, exact.gradient())
    assert risk.dtype == loss_fn.weight.dtype == torch.float32
    assert torch.equal(double.to(torch.float32).gradient(), risk.gradient())


def test_a_copy_in_float64_has_the_chosen_parameters(model):
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), [(X, Y)], params="2.*")
    assert risk.to(torch.float64).space.names == risk.space.names
    assert risk.to("cpu").device == torch.device("cpu")


def test_restricted_to_one_layer(model):
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), [(X, Y)])
    layer = risk.restrict("2.*")
    offset = risk.space.size - layer.space.size
    torch.testing.assert_close(layer.gradient(), risk.gradient()[offset:], rtol=1e-12, atol=1e-14)
    assert layer.loss() == risk.loss()
    assert len(risk.space.names) == 4
    with pytest.raises(ValueError, match=r"params: no trainable parameter matches 'nine\.\*'; there are 0\.weight"):
        risk.restrict("nine.*")


def test_gradient_at_another_point_leaves_both_points_alone(model):
    risk = EmpiricalRisk(model, nn.CrossEntropyLoss(), [(X, Y)])
    there = risk.space.vector() + 0.3
    before = there.clone()
    with assert_untouched(model):
        gradient = risk.gradient_at(there)
    assert torch.equal(there, before)
    with risk.at(there):
        assert torch.equal(risk.gradient(), gradient)
    assert not torch.equal(risk.gradient(), gradient)
