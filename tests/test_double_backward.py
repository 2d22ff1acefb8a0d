"""The replaced second derivatives are autograd's own numbers."""

import contextlib

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from cases import normal
from losslab.operators.double_backward import CheapDoubleBackward

CONVOLUTIONS = {
    "conv1d": (F.conv1d, (2, 4, 7), (6, 4, 3), {}),
    "conv2d": (F.conv2d, (2, 2, 5, 5), (3, 2, 3, 3), {}),
    "conv3d": (F.conv3d, (1, 2, 3, 3, 3), (2, 2, 2, 2, 2), {}),
    "stride and padding": (F.conv2d, (2, 2, 5, 6), (3, 2, 3, 3), {"stride": 2, "padding": (1, 2)}),
    "dilation": (F.conv2d, (2, 2, 6, 5), (3, 2, 2, 2), {"dilation": 2}),
    "groups": (F.conv2d, (2, 4, 4, 4), (6, 2, 3, 3), {"groups": 2, "padding": 1}),
    "padding by name": (F.conv2d, (2, 2, 4, 4), (3, 2, 3, 3), {"padding": "same"}),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_convolutions(name, with_bias):
    function, x_shape, w_shape, options = CONVOLUTIONS[name]
    inputs = [normal(*x_shape), normal(*w_shape, seed=1)] + [normal(w_shape[0], seed=2)] * with_bias
    inputs = [t.requires_grad_() for t in inputs]

    def replaced(*tensors):
        with CheapDoubleBackward():
            return function(*tensors, **options)

    torch.testing.assert_close(replaced(*inputs), function(*inputs, **options))
    assert gradcheck(replaced, inputs)
    assert gradgradcheck(replaced, inputs)


@pytest.mark.parametrize("function", [F.relu, torch.relu, lambda x: x.relu(), nn.ReLU(), nn.ReLU(inplace=True)])
def test_relu(function):
    x = normal(4, 3).requires_grad_()

    def cubed(t):
        with CheapDoubleBackward():
            return function(1.0 * t) ** 3

    assert gradcheck(cubed, [x])
    assert gradgradcheck(cubed, [x])


def test_the_graph_holds_no_native_convolution_or_relu():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3))
    with CheapDoubleBackward():
        out = net(torch.randn(2, 1, 6, 6))
    names, stack = set(), [out.grad_fn]
    while stack:
        node = stack.pop()
        names.add(node.name())
        stack += [n for n, _ in node.next_functions if n is not None]
    assert "_ConvolutionBackward" in names
    assert "_ReLUBackward" in names
    assert not {"ConvolutionBackward0", "ReluBackward0"} & names


def test_only_one_of_three_inputs_needs_a_gradient():
    x, w = normal(2, 1, 4, 4), normal(2, 1, 3, 3, seed=1)
    for frozen in (x, w):
        moving = w if frozen is x else x
        moving = moving.clone().requires_grad_()

        def replaced(t, frozen=frozen):
            with CheapDoubleBackward():
                return (F.conv2d(t, w) if frozen is w else F.conv2d(x, t)) ** 2

        assert gradgradcheck(replaced, [moving])


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_gradients_along_the_incoming_one(name, with_bias):
    """Jv from the graph of Jᵀu, which then holds neither u nor derivatives with respect to x and w."""
    function, x_shape, w_shape, options = CONVOLUTIONS[name]
    inputs = [normal(*x_shape), normal(*w_shape, seed=1)] + [normal(w_shape[0], seed=2)] * with_bias
    inputs = [t.requires_grad_() for t in inputs]
    directions = [normal(*t.shape, seed=3 + i) for i, t in enumerate(inputs)]

    def along(mode):
        with mode:
            outputs = function(*inputs, **options).relu()
        dual = torch.ones_like(outputs, requires_grad=True)
        gradients = torch.autograd.grad(outputs, inputs, dual, create_graph=True)
        return torch.autograd.grad(gradients, dual, directions)[0]

    torch.testing.assert_close(along(CheapDoubleBackward(linear=True)), along(contextlib.nullcontext()))


def test_a_gradient_taken_inside_a_linear_block_keeps_all_its_derivatives():
    inputs = [t.requires_grad_() for t in (normal(2, 2, 5, 5), normal(3, 2, 3, 3, seed=1))]

    def slope(mode):
        with mode:
            inner = torch.autograd.grad((F.conv2d(*inputs) ** 3).sum(), inputs[0], create_graph=True)[0]
            total = (F.conv2d(inner, inputs[1]) ** 2).sum()
        return torch.autograd.grad(total, inputs)

    for ours, autograds in zip(slope(CheapDoubleBackward(linear=True)), slope(contextlib.nullcontext()), strict=True):
        torch.testing.assert_close(ours, autograds)


def test_all_directions_at_once():
    """gradgradcheck asks for one output at a time; a Hessian product moves x, w and b together."""
    inputs = [t.requires_grad_() for t in (normal(2, 2, 5, 5), normal(3, 2, 3, 3, seed=1), normal(3, seed=2))]
    directions = [normal(*t.shape, seed=3 + i) for i, t in enumerate(inputs)]

    def product(mode):
        with mode:
            loss = (F.conv2d(*inputs) ** 3).sum()
        gradients = torch.autograd.grad(loss, inputs, create_graph=True)
        return torch.autograd.grad(gradients, inputs, grad_outputs=directions)

    for ours, autograds in zip(product(CheapDoubleBackward()), product(contextlib.nullcontext()), strict=True):
        torch.testing.assert_close(ours, autograds)
