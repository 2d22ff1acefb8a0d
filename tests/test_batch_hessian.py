"""The Hessian of a batch's loss: exact where there are second derivatives, differences where not, nothing touched."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from cases import classes, normal, seeded
from losslab.operators.gradient_graph import lacks_second_derivative
from losslab.optim.homotopy.batch_hessian import BatchHessian
from losslab.optim.homotopy.buffers import kept_buffers
from quadratics import Quadratic, symmetric
from second_derivatives import Once
from untouched import assert_untouched

SHAPES = [(3, 4), (5,), ()]
X, Y = normal(12, 4), classes(12)


def hessian(model: Quadratic, *args, **settings) -> BatchHessian:
    return BatchHessian(lambda: model(*args), list(model.parameters()), **settings)


def network(dtype: torch.dtype = torch.float64, middle: nn.Module | None = None) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 6), middle or nn.Tanh(), nn.Linear(6, 3))).to(dtype)


def exact(model: nn.Module, loss, vector: torch.Tensor) -> torch.Tensor:
    """Hv by autograd alone."""
    parameters = list(model.parameters())
    grads = torch.autograd.grad(loss(), parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in grads])
    return torch.cat([h.reshape(-1) for h in torch.autograd.grad(flat, parameters, vector)])


@torch.library.custom_op("losslab_tests::cube", mutates_args=())
def cube(x: torch.Tensor) -> torch.Tensor:
    return x**3


@torch.library.custom_op("losslab_tests::cube_backward", mutates_args=())
def cube_backward(g: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return 3 * x**2 * g


cube.register_autograd(
    lambda ctx, g: cube_backward(g, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_products_are_those_of_the_matrix(dtype, within):
    H = symmetric(18, dtype=dtype)
    model = Quadratic(H, SHAPES)
    found = hessian(model)
    assert found.dtype == dtype
    assert found.complaint is None
    assert found.loss == pytest.approx(float(model().detach()), rel=1e-6)
    assert found.gradient_norm == pytest.approx(float((H @ model.w).norm()), rel=1e-6)
    V = normal(18, 3).to(dtype)
    assert float((found @ V - H @ V).norm()) < within * float((H @ V).norm())
    assert torch.equal(found.to_dense()[:, 0], found @ torch.eye(18, dtype=dtype)[0])


def test_a_root_goes_on_both_sides():
    H, scale = symmetric(18), normal(18, seed=5).abs()
    model = Quadratic(H, SHAPES)
    parts = [part.reshape(shape) for part, shape in zip(scale.split([12, 5, 1]), SHAPES, strict=True)]
    found = hessian(model, root=lambda vs: [p * v for p, v in zip(parts, vs, strict=True)])
    assert torch.allclose(found.to_dense(), scale[:, None] * H * scale, atol=1e-12)
    assert found.gradient_norm == pytest.approx(float((H @ model.w).norm()))  # without the root


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-6), (torch.float32, 1e-2)])
def test_differences_where_a_function_has_one_derivative(dtype, within):
    H = symmetric(18, dtype=dtype)
    model = Quadratic(H, SHAPES)
    found = hessian(model, Once.apply)
    V = normal(18, 3).to(dtype)
    assert "once_differentiable" in found.complaint
    assert found.precision > 100 * torch.finfo(dtype).eps
    error = float((found @ V - H @ V).norm()) / float((H @ V).norm())
    assert 0 < error < within
    known = hessian(model, differences=True)
    assert torch.equal(known @ V, hessian(model, Once.apply) @ V)
    assert float((found @ torch.zeros(18)).norm()) == 0
    assert (found @ torch.full((18,), torch.nan)).isnan().all()


def test_differences_where_a_custom_operation_has_no_second_derivative():
    w = nn.Parameter(normal(6))
    for factor in (1.0, 1e6):  # a vector of any length
        vector = factor * normal(6, seed=1)
        found = BatchHessian(lambda: cube(w).sum(), [w])
        assert torch.allclose(found @ vector, 6 * w * vector, rtol=1e-6)
        assert "no autograd formula" in found.complaint


def test_steps_of_differences_fit_a_trained_network():
    """Along the first eigenvector of a trained network, where the longest step that rounding allows is far too long."""
    model, x, y = network(torch.float32), X.float(), Y
    optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)
    for _ in range(200):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    parameters, loss = list(model.parameters()), lambda: cross_entropy(model(x), y)
    vector = torch.linalg.eigh(BatchHessian(loss, parameters).to_dense())[1][:, -1]
    product = exact(model, loss, vector)
    found = BatchHessian(loss, parameters, differences=True) @ vector
    assert float((found - product).norm()) < 0.01 * float(product.norm())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("outside", [False, True])
def test_gradient_checkpointing(reentrant, outside):
    """Without reentry it has second derivatives; with it, it has not even `autograd.grad`."""
    model = network()
    inputs = X.clone().requires_grad_()  # else reentrant checkpoints have no gradient
    first = 1 if outside else 0  # with a layer before it autograd refuses, without it says nothing

    def loss() -> torch.Tensor:
        return cross_entropy(checkpoint(model[first:], model[:first](inputs), use_reentrant=reentrant), Y)

    vector = normal(sum(p.numel() for p in model.parameters()), seed=4)
    product = exact(model, lambda: cross_entropy(model(X), Y), vector)
    with assert_untouched(model):
        found = BatchHessian(loss, list(model.parameters()))
        assert float((found @ vector - product).norm()) < (1e-6 if reentrant else 1e-12) * float(product.norm())
    assert (found.complaint is not None) == reentrant
    assert found.loss == pytest.approx(float(loss().detach()))
    assert inputs.grad is None or reentrant


def test_checkpointed_dropout_is_drawn_alike():
    """The value and the gradient that `backward` gives are of the same draw."""
    model = network(middle=nn.Dropout(0.5))
    inputs, parameters = X.clone().requires_grad_(), list(model.parameters())
    loss = lambda: cross_entropy(checkpoint(model, inputs, use_reentrant=True), Y)  # noqa: E731
    state = torch.get_rng_state()
    plain = BatchHessian(lambda: cross_entropy(model(X), Y), parameters)
    found = BatchHessian(loss, parameters)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.loss == pytest.approx(plain.loss)
    assert found.gradient_norm == pytest.approx(plain.gradient_norm)


@pytest.mark.parametrize("differences", [False, True])
def test_what_is_drawn_is_drawn_alike_and_nothing_is_touched(differences):
    model = network(middle=nn.Sequential(nn.Tanh(), nn.Dropout(0.5)))
    loss = lambda: cross_entropy(model(X), Y)  # noqa: E731
    with assert_untouched(model):
        found = BatchHessian(loss, list(model.parameters()), differences=differences)
        vector = normal(found.size)
        state = torch.get_rng_state()
        one, two = found @ vector, found @ vector
        again = BatchHessian(loss, list(model.parameters()), differences=differences) @ vector
        assert torch.equal(one, two)
        assert torch.equal(one, again)
        torch.set_rng_state(state)
        assert float((exact(model, loss, vector) - one).norm()) < 1e-5 * float(one.norm())
        torch.set_rng_state(state)


@pytest.mark.parametrize("call", [2, 3, 4])
def test_an_error_in_the_midst_leaves_the_weights(call):
    model, calls = Quadratic(symmetric(18), SHAPES), []

    def loss() -> torch.Tensor:
        calls.append(0)
        if len(calls) == call:
            raise ValueError("no more data")
        return model(Once.apply)

    def products() -> None:
        BatchHessian(loss, list(model.parameters())) @ normal(18)

    with assert_untouched(model), pytest.raises(ValueError, match="no more data"):
        products()


def test_a_loss_that_fails_otherwise_is_told():
    w = nn.Parameter(normal(3))
    with pytest.raises(RuntimeError, match="size"):
        BatchHessian(lambda: w @ normal(4), [w])
    with pytest.raises(TypeError, match=r"loss: expected a function that returns a tensor of one number, got float"):
        BatchHessian(lambda: w.detach().sum().item(), [w])
    with pytest.raises(TypeError, match=r"got one of shape \(3,\)"):
        BatchHessian(lambda: w, [w])


def test_a_loss_that_does_not_curve():
    w, unused = nn.Parameter(normal(3)), nn.Parameter(normal(2))
    linear = BatchHessian(w.sum, [w, unused])
    assert linear.gradient_norm == pytest.approx(3**0.5)
    assert linear.gradients[1] is None
    assert not (linear @ normal(5)).any()
    constant = BatchHessian(lambda: torch.tensor(2.0), [w])
    assert (constant.loss, constant.gradient_norm) == (2.0, 0.0)
    assert not (constant @ normal(3)).any()


def test_parameters_of_several_precisions():
    H = symmetric(17)
    model = Quadratic(H, [(3, 4), (5,)])
    model.parts[1].data = model.parts[1].data.float()
    found = BatchHessian(model, list(model.parameters()))
    vector = normal(17)
    assert found.dtype == torch.float64
    assert torch.allclose(found @ vector, H @ vector, rtol=1e-5)
    half = BatchHessian(model, list(model.parameters()), differences=True)
    assert float((half @ vector - H @ vector).norm()) < 1e-2 * float((H @ vector).norm())
    assert model.parts[1].dtype == torch.float32


def test_half_precision_has_no_differences():
    model = Quadratic(symmetric(4, dtype=torch.bfloat16))
    assert float((hessian(model) @ torch.ones(4) - model.H.sum(1)).norm()) < 0.1
    with pytest.raises(ValueError, match=r"expected float32 or float64 for finite differences, got torch\.bfloat16"):
        hessian(model, differences=True) @ torch.ones(4)


@pytest.mark.parametrize("differences", [False, True])
@pytest.mark.parametrize("outer", [False, True])
def test_inside_autocast(outer, differences):
    """The products are those of bfloat16; a cast of the weights that autocast remembers is not that of moved ones."""
    model, x = network(torch.float32), 5 * X.float()
    parameters = list(model.parameters())

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return cross_entropy(model(x), Y)

    values, vectors = torch.linalg.eigh(BatchHessian(lambda: cross_entropy(model(x), Y), parameters).to_dense())
    with torch.autocast("cpu", torch.bfloat16, enabled=outer):
        loss()
        found = BatchHessian(loss, parameters, differences=differences) @ vectors[:, -1]
    assert float(vectors[:, -1] @ found) == pytest.approx(float(values[-1]), rel=0.3 if differences else 0.02)


def test_attention_and_batch_norm():
    """Fast attention has no second derivative; buffers are put back, the same tensors."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.out = nn.BatchNorm1d(4), nn.Linear(4, 3)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen = self.seen + 1  # replaced, not written into
            h = self.norm(x)[None]
            return self.out(nn.functional.scaled_dot_product_attention(h, h, h)[0])

    model = seeded(Net).double()
    before, seen = copy.deepcopy(model.state_dict()), model.seen
    with kept_buffers(model):
        found = BatchHessian(lambda: cross_entropy(model(X), Y), list(model.parameters()))
        assert found.complaint is None
        vector = normal(found.size)
        product = found @ vector
    assert model.seen is seen
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    differences = BatchHessian(lambda: cross_entropy(model(X), Y), list(model.parameters()), differences=True)
    assert float((differences @ vector - product).norm()) < 1e-5 * float(product.norm())


@pytest.mark.parametrize("root", [None, lambda vs: [v * v.new_ones(v.shape) for v in vs]])
@pytest.mark.parametrize("differences", [False, True])
def test_sparse_gradients_of_embeddings_count_as_whole_ones(differences, root):
    rows = torch.tensor([1, 2, 2, 5])
    found = []
    for sparse in (False, True):
        table = nn.Embedding(7, 3, sparse=sparse, dtype=torch.float64)
        with torch.no_grad():
            table.weight.copy_(normal(7, 3))
        loss = lambda table=table: table(rows).tanh().square().sum()  # noqa: E731
        of_batch = BatchHessian(loss, [table.weight], root=root, differences=differences)
        found.append((of_batch.gradient_norm, of_batch @ normal(21)))
    (norm, product), (sparse_norm, sparse_product) = found
    assert norm == sparse_norm > 0
    torch.testing.assert_close(product, sparse_product, rtol=0, atol=1e-12)
    assert product.norm() > 0.1


def test_a_compiled_convolution_has_differences_for_products():
    """Tracing it meets torch's own convolution; torch.compile has no second derivative, which is said."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).double()
    images, targets = normal(5, 16).reshape(5, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1])
    compiled = torch.compile(model, backend="aot_eager")
    vector = normal(sum(parameter.numel() for parameter in model.parameters()))
    expected = BatchHessian(lambda: cross_entropy(model(images), targets), list(model.parameters())) @ vector
    found = BatchHessian(lambda: cross_entropy(compiled(images), targets), list(model.parameters()))
    assert float((found @ vector - expected).norm()) < 1e-5 * float(expected.norm())
    assert "double backward" in str(found.complaint)


def test_what_a_backend_has_given_away_is_a_missing_second_derivative():
    """torch's words where its default backend compiled linear layers: needs a compiler, so the words alone."""
    torchs = "This backward function was compiled with non-empty donated buffers which requires create_graph=False"
    assert lacks_second_derivative(RuntimeError(torchs))
    assert not lacks_second_derivative(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
