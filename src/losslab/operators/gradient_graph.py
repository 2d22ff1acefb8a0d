"""A batch's gradient kept linearised: the graph that `create_graph=True` leaves, applied to vectors again and again.

Pearlmutter's trick (1994): Hv = ∂⟨∇L, v⟩/∂θ. Building the graph costs one gradient and more memory; each product
afterwards is one pass backwards through it, 1.1–2.2 g by operations (reference: rebuilt each time 3 g).
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from losslab.operators.double_backward import CheapDoubleBackward
from losslab.operators.risk import EmpiricalRisk

_COMPLAINTS = (
    "derivative for",
    "double backward",
    "differentiate twice",
    "cudnn RNN",
    "heckpoint",
    "no autograd formula",
    "donated buffers",  # of what torch.compile has made
)


class MissingSecondDerivative(RuntimeError):
    """An operation of the model or the loss cannot be differentiated twice."""


class GradientGraph:
    """The gradient of one batch's share of the risk, ready for products with its derivative.

    Args:
        risk: Where the model and loss come from.
        leaves: The parameters by name, requiring gradients.
        batch: One batch on the device, with `count` examples.
    """

    def __init__(self, risk: EmpiricalRisk, leaves: dict[str, Tensor], batch: Any, count: int):
        self._space, self._leaves, self.count = risk.space, list(leaves.values()), count
        with (
            risk.evaluating(),
            torch.enable_grad(),
            sdpa_kernel(SDPBackend.MATH),  # the fast attention kernels have no second derivative
            CheapDoubleBackward(),
            explained(risk, leaves, batch),
        ):
            loss = self._loss(risk, leaves, batch, count)
            grads: Sequence[Tensor | None] = [None] * len(self._leaves)
            if loss.requires_grad:
                grads = differentiable_gradient(loss, self._leaves)
        # A parameter that is unused has gradient zero, one that enters linearly a constant one: no second derivatives.
        self._curved = [(i, g) for i, g in enumerate(grads) if g is not None and g.requires_grad]
        self._explained = lambda: explained(risk, leaves, batch)

    def _loss(self, risk: EmpiricalRisk, leaves: dict[str, Tensor], batch: Any, count: int) -> Tensor:
        return risk.batch_share(leaves, batch, count)

    def add_products(self, rows: Tensor, out: Tensor) -> None:
        """Add H_b v to the row of `out` for each row v of `rows`, both (k, P)."""
        outputs = [gradient for _, gradient in self._curved]
        if not outputs:
            return
        for vector, total in zip(rows, out, strict=True):
            views = self._space.views(vector)
            directions = [views[i] for i, _ in self._curved]
            with self._explained():
                products = torch.autograd.grad(
                    outputs, self._leaves, grad_outputs=directions, retain_graph=True, allow_unused=True
                )
            self._space.add_to(total, products)

    def num_bytes(self) -> int:
        """What the graph keeps alive beside the parameters."""
        return graph_bytes([gradient for _, gradient in self._curved], self._leaves)


def graph_bytes(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> int:
    """Bytes of the tensors that the outputs' graphs have saved, the leaves left out, each storage once."""
    known = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    sizes: dict[int, int] = {}
    for node in _nodes(outputs):
        for tensor in _saved_tensors(node):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(size for pointer, size in sizes.items() if pointer not in known)


def differentiable_gradient(loss: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """∇L with the graph that leads to it; None for what L does not depend on.

    Raises:
        RuntimeError: The graph leads through a `once_differentiable` function, whose gradient torch takes for constant
            without a word, or through a reentrant checkpoint, whose parameters it takes for unused.
    """
    if has_reentrant_checkpoints(loss):
        raise RuntimeError("a reentrant checkpoint cannot be differentiated twice; checkpoint(…, use_reentrant=False)")
    # The incoming 1 requires a gradient: else a function marked so that comes last leaves no trace of it.
    one = torch.ones_like(loss, requires_grad=True)
    gradients = torch.autograd.grad(loss, inputs, grad_outputs=one, create_graph=True, allow_unused=True)
    require_second_derivatives(gradients)
    return gradients


def require_second_derivatives(gradients: Sequence[Tensor | None]) -> None:
    """Refuse gradients that lead through a `once_differentiable` function.

    `torch.autograd.grad` with given inputs takes such a function's gradient for a constant, without a word.
    """
    if any(node.name() == "torch::autograd::Error" for node in _nodes([g for g in gradients if g is not None])):
        raise RuntimeError("trying to differentiate twice a function that was marked with @once_differentiable")


def has_reentrant_checkpoints(output: Tensor) -> bool:
    """Whether something on the way to it is under `checkpoint(use_reentrant=True)`.

    `torch.autograd.grad` knows nothing of the parameters inside, and takes them for unused without a word.
    """
    return any("CheckpointFunction" in node.name() for node in _nodes([output]))


def _nodes(outputs: Sequence[Tensor]) -> Iterator[Any]:
    """Every node of the outputs' graphs, once."""
    seen: set[Any] = set()
    stack: list[Any] = [output.grad_fn for output in outputs]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack += [following for following, _ in node.next_functions]


def _saved_tensors(node: Any) -> Iterator[Tensor]:
    for name in dir(node):
        if name.startswith("_saved_") or name == "saved_tensors":
            value = getattr(node, name)
            yield from (t for t in (value if isinstance(value, list | tuple) else [value]) if isinstance(t, Tensor))


def lacks_second_derivative(error: RuntimeError) -> bool:
    """Whether this is autograd's complaint that something cannot be differentiated twice."""
    return any(sign in str(error) for sign in _COMPLAINTS)


@contextlib.contextmanager
def explained(risk: EmpiricalRisk, leaves: dict[str, Tensor], batch: Any) -> Iterator[None]:
    """Turn autograd's complaint about a missing second derivative into one that names the module."""
    try:
        yield
    except RuntimeError as error:
        if not lacks_second_derivative(error):
            raise
        module = _module_without_second_derivative(risk, leaves, batch)
        where = f"module {module!r}" if module else "the loss function or code outside the model's submodules"
        raise MissingSecondDerivative(
            f"second derivatives: {where} has none ({str(error).splitlines()[0]}); "
            "use an implementation made of differentiable operations, or leave its parameters out with params=…"
        ) from error


def _module_without_second_derivative(risk: EmpiricalRisk, leaves: dict[str, Tensor], batch: Any) -> str | None:
    """The deepest submodule whose output cannot be differentiated twice with respect to its inputs and parameters."""
    calls: list[tuple[str, nn.Module, tuple[Any, ...], dict[str, Any]]] = []

    def remember(name: str) -> Any:
        return lambda module, args, kwargs: calls.append((name, module, args, kwargs))

    hooks = [m.register_forward_pre_hook(remember(n), with_kwargs=True) for n, m in risk.model.named_modules() if n]
    try:
        with risk.evaluating(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            risk.output(leaves, batch)
    finally:
        for hook in hooks:
            hook.remove()
    with risk.evaluating():
        failing = [name for name, module, args, kwargs in calls if not _twice_differentiable(module, args, kwargs)]
    return max(failing, key=lambda name: name.count("."), default=None)


def _twice_differentiable(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    def fresh(value: Any) -> Any:
        is_real = isinstance(value, Tensor) and value.is_floating_point()
        return value.detach().clone().requires_grad_() if is_real else value

    args = tuple(fresh(value) for value in args)
    state = {name: fresh(p) for name, p in module.named_parameters()}
    inputs = [v for v in (*args, *state.values()) if isinstance(v, Tensor) and v.requires_grad]
    state |= {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        with torch.enable_grad():
            output = torch.func.functional_call(module, state, args, kwargs)
            output = output[0] if isinstance(output, list | tuple) else output
            if not isinstance(output, Tensor) or not output.requires_grad:
                return True
            grads = differentiable_gradient(output.pow(2).sum(), inputs)
            curved = sum((g.pow(2).sum() for g in grads if g is not None and g.requires_grad), torch.zeros(()))
            if curved.requires_grad:
                torch.autograd.grad(curved, inputs, allow_unused=True)
    except RuntimeError:
        return False
    return True
