"""A network's Hessian against differences of its gradient; a function that has none."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from cases import gen
from losslab.operators.hessian import Hessian
from losslab.operators.risk import EmpiricalRisk


def assert_hessian(model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
    """Hv of a float64 model equals the central difference of the gradient along v, to 1e-6."""
    params = list(model.parameters())
    start = nn.utils.parameters_to_vector(params).detach()
    vector = torch.randn(len(start), generator=gen(1), dtype=torch.float64)
    vector /= vector.norm()
    product = Hessian(EmpiricalRisk(model, nn.CrossEntropyLoss(), [(inputs, targets)])) @ vector

    def gradient(step: float) -> Tensor:
        nn.utils.vector_to_parameters(start + step * vector, params)
        with sdpa_kernel(SDPBackend.MATH):
            found = torch.autograd.grad(cross_entropy(model(inputs), targets), params)
        return nn.utils.parameters_to_vector(found)

    difference = (gradient(1e-4) - gradient(-1e-4)) / 2e-4
    nn.utils.vector_to_parameters(start, params)
    assert product.norm() > 1e-3
    assert (product - difference).norm() < 1e-6 * product.norm()


class Once(torch.autograd.Function):
    """2x, without a second derivative."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return 2 * grad
