"""Convolution and ReLU with cheaper second derivatives, put in place while a gradient graph is built.

Autograd's double backward of a convolution computes the weight's part as a convolution whose kernels are as large as
the image, and that of a ReLU makes a tensor of zeros and adds it. Here both use the primitives of the first backward
pass only: the same numbers, and products with a kept graph cost about 0.8 of the time (3-conv net, CPU).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_aten = torch.ops.aten
# stride, padding, dilation, transposed, output_padding, groups: aten::convolution's arguments after the bias.
_Arguments = tuple[list[int], list[int], list[int], bool, list[int], int]


class CheapDoubleBackward(TorchFunctionMode):
    """While active, `conv1d`, `conv2d`, `conv3d` and `relu` have the second derivatives of this file.

    Args:
        linear: Gradients taken after the block will be differentiated with respect to the incoming gradient alone, in
            which they are linear (`Linearized` does that). Their derivatives with respect to x and w are then left
            out: half of the convolutions in Jv, since autograd does not tell a Python function that nobody asks for
            them, and the saved incoming gradients. A gradient that the model itself takes inside the block keeps them.
    """

    def __init__(self, *, linear: bool = False):
        super().__init__()
        self._linear, self._active = linear, False

    @property
    def gradients_are_linear(self) -> bool:
        """Whether gradients taken now are differentiated with respect to the incoming gradient alone."""
        return self._linear and not self._active

    def __enter__(self) -> "CheapDoubleBackward":
        self._active = True
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        self._active = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Replace the calls this file knows; let all others through."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # what dynamo traces are torch's own calls
            return func(*args, **kwargs)
        if func in _CONVOLUTIONS and not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda"):
            return _convolution(self, func, *args, **kwargs)
        if func in _RELUS and not (kwargs.get("inplace") or args[1:] == (True,)):
            return _ReLU.apply(args[0] if args else kwargs["input"])
        if func is torch._weight_norm:
            return _weight_norm(*args, **kwargs)
        return func(*args, **kwargs)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """The fused function's second derivative is wrong (torch 2.13: gradgradcheck fails)."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


_CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
_RELUS = {torch.relu, torch.Tensor.relu, functional.relu}  # an in-place relu changes its input: not replaced


def _convolution(
    mode: CheapDoubleBackward,
    func: Callable[..., Tensor],
    input: Tensor,  # torch's own argument names, which callers may use
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | list[int] = 1,
    padding: int | list[int] | str = 0,
    dilation: int | list[int] = 1,
    groups: int = 1,
) -> Tensor:
    num_axes = _CONVOLUTIONS[func]
    if isinstance(padding, str) or input.ndim != num_axes + 2 or not input.is_floating_point():
        return func(input, weight, bias, stride, padding, dilation, groups)

    def per_axis(value: int | list[int]) -> list[int]:
        values = [value] if isinstance(value, int) else list(value)
        return values * num_axes if len(values) == 1 else values

    arguments = (per_axis(stride), per_axis(padding), per_axis(dilation), False, [0] * num_axes, groups)
    return _Convolution.apply(input, weight, bias, arguments, mode)


class _Convolution(Function):
    """y = w * x + b."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, arguments: _Arguments, mode: CheapDoubleBackward
    ) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.arguments, ctx.has_bias, ctx.mode = arguments, b is not None, mode
        return _aten.convolution(x, w, b, *arguments)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, w = ctx.saved_tensors
        if ctx.mode.gradients_are_linear:
            x, w = x.detach(), w.detach()
        mask = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.has_bias and ctx.needs_input_grad[2])
        return (*_ConvolutionBackward.apply(grad, x, w, mask, ctx.arguments), None, None)


class _ConvolutionBackward(Function):
    """(∂y/∂x)ᵀg, (∂y/∂w)ᵀg, (∂y/∂b)ᵀg: bilinear in (g, w) and (g, x), so its derivatives are the same three maps."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, w: Tensor, mask: tuple[bool, ...], arguments: _Arguments) -> Any:
        ctx.save_for_backward(g if any(ctx.needs_input_grad[1:3]) else None, x, w)  # the derivative along g needs no g
        ctx.arguments, ctx.shape = arguments, g.shape
        ctx.set_materialize_grads(False)
        return _aten.convolution_backward(g, x, w, [w.shape[0]], *arguments, list(mask))

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, dw: Tensor | None, db: Tensor | None) -> tuple[Any, ...]:
        g, x, w = ctx.saved_tensors
        arguments = ctx.arguments
        along_g = along_x = along_w = None
        if ctx.needs_input_grad[0]:
            if dw is not None:
                along_g = _aten.convolution(x, dw, db, *arguments)
            elif db is not None:
                along_g = db.reshape(1, -1, *[1] * (len(ctx.shape) - 2)).expand(ctx.shape).clone()
            if dx is not None:
                through_w = _aten.convolution(dx, w, None, *arguments)
                along_g = through_w if along_g is None else along_g.add_(through_w)
        if ctx.needs_input_grad[1] and dw is not None:
            along_x = _aten.convolution_backward(g, x, dw, None, *arguments, [True, False, False])[0]
        if ctx.needs_input_grad[2] and dx is not None:
            along_w = _aten.convolution_backward(g, dx, w, None, *arguments, [False, True, False])[1]
        return along_g, along_x, along_w, None, None


class _ReLU(Function):
    """max(x, 0); its second derivative is zero wherever it has one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.relu(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _ReLUBackward.apply(grad, *ctx.saved_tensors)


class _ReLUBackward(Function):
    """g where y > 0, else 0: linear in g, and constant in y."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return _aten.threshold_backward(g, y, 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return _aten.threshold_backward(grad, y, 0), None
