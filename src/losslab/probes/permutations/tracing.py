"""The permutation specification of any network, found by watching one forward pass."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as global_hooks
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode

from losslab.operators.batches import tensors_of
from losslab.operators.risk import EmpiricalRisk
from losslab.probes.permutations import layer_rules, view_rules
from losslab.probes.permutations.axis_rules import Axes, Rule, placed
from losslab.probes.permutations.layer_rules import pointwise
from losslab.probes.permutations.permutations import PermutationSpec
from losslab.probes.permutations.specification import specification
from losslab.probes.permutations.unification import Axis, atoms, fix

RULES = layer_rules.RULES | view_rules.RULES
_READS_VALUES = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "allclose", "_unique2")


@torch.no_grad()
def permutation_spec(risk: EmpiricalRisk) -> PermutationSpec:
    """Which units can change places without changing the function?  Found by watching one forward pass.

    Every operation of the pass on the first batch is seen below autograd, where layers, functions and attention are
    all made of some sixty elementary operations, and says which axes of which tensors it matches entry by entry
    (`axis_rules`). `unification` gives the rest: residual streams share one permutation, normalisation follows
    its channels, flattened images move channel by channel, attention moves heads whole and, within each head, its
    coordinates. Inputs, outputs, rows of embeddings, buffers other than running statistics, and parameters that the
    risk does not choose keep their places; so does all that an operation
    without a rule has touched. All units found are then permuted at random, and the outputs compared.

    Args:
        risk: Whose model and parameters, and the batch.

    Returns:
        PermutationSpec. Cost: three forward passes over one batch; the first holds all its activations.

    Raises:
        ValueError: The forward pass reads values (data-dependent control flow), so that another batch may take
            another way (the message names the module); or the outputs differ.
    """
    spec = _trace(risk).specification()
    _check(risk, spec)
    return spec


def _check(risk: EmpiricalRisk, spec: PermutationSpec) -> None:
    """Permute everything at random: the first batch's outputs must stay what they were."""
    state = {name: tensor.detach() for name, tensor in (*risk.model.named_parameters(), *risk.model.named_buffers())}
    shuffled = spec.apply({name: state[name] for name in spec.layouts}, spec.random(np.random.default_rng(0)))
    outputs = []
    for parameters in ({}, shuffled):
        with risk.evaluating():
            batch, _ = next(risk.read())
            outputs.append(tensors_of(risk.output(parameters, batch)))
    for x, y in zip(*outputs, strict=True):
        scale = x.abs().max() if x.is_floating_point() and x.isfinite().all() else None
        # Rounding differs with the order of a sum; a wrong permutation changes the outputs' leading digits.
        if scale is not None and float((x - y).abs().max()) > float(scale) * torch.finfo(x.dtype).eps ** 0.5:
            raise ValueError(
                "risk: expected a function that stays the same when the units found are permuted, got one that "
                f"changes by {float((x - y).abs().max() / scale):.2g} of its size; the network hides a dependence from "
                "torch's operations (a tensor made by other means)"
            )


def _trace(risk: EmpiricalRisk) -> "Tracer":
    """One forward pass on the first batch, watched."""
    running = dict(running_statistics(risk.model))
    tensors = {name: view.clone() for name, view in risk.space.named_views(risk.space.vector()).items()}
    tensors |= {name: buffer.clone() for name, buffer in running.items()}
    tracer = Tracer(tensors)
    with risk.evaluating(), sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        batch, _ = next(risk.read(), (None, 0))
        if batch is None:
            raise ValueError("batches: expected a batch on every process, to follow its way through the network")
        for tensor in tensors_of(batch):
            tracer.note(tensor, placed(tensor.shape), varying=True)
        with module_calls(risk.model, tracer.entered, tracer.left), tracer:
            output = risk.output(tensors, batch)
        for tensor in tensors_of(output):
            fix(*tracer.axes(tensor))
    return tracer


def running_statistics(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that follow a layer's channels, by name."""
    for name, layer in model.named_modules():
        if isinstance(layer, _NormBase):
            for buffer in ("running_mean", "running_var"):
                if getattr(layer, buffer, None) is not None:
                    yield f"{name}.{buffer}".lstrip("."), getattr(layer, buffer)


@contextlib.contextmanager
def module_calls(model: nn.Module, entered: Callable[[str], None], left: Callable[[str, Any], Any]) -> Iterator[None]:
    """Call `entered(name)` and `left(name, output)` around each submodule's forward, without a hook on the model.

    What `left` returns, unless None, takes the output's place.
    """
    names = {id(module): name for name, module in model.named_modules()}

    def before(module: nn.Module, arguments: Any) -> None:
        if id(module) in names:
            entered(names[id(module)])

    def after(module: nn.Module, arguments: Any, output: Any) -> Any:
        return left(names[id(module)], output) if id(module) in names else None

    with contextlib.ExitStack() as stack:
        stack.callback(global_hooks.register_module_forward_pre_hook(before).remove)
        stack.callback(global_hooks.register_module_forward_hook(after).remove)
        yield


class Tracer(TorchDispatchMode):
    """Knows the axes of every tensor that it sees made.

    Attributes:
        outputs: The axes of what each module call returned, in the order of their ends; None where that is no tensor.
    """

    def __init__(self, tensors: dict[str, Tensor]):
        super().__init__()
        self.named = {name: [Axis(size) for size in tensor.shape] for name, tensor in tensors.items()}
        self.outputs: list[Axes | None] = []
        self.unknown: dict[str, None] = {}
        self._known: dict[int, tuple[Tensor, Axes, bool]] = {}  # the tensor is held, so that its id stays its own
        self._used: set[int] = set()
        self._inside: list[str] = []
        for name, tensor in tensors.items():
            self.note(tensor, self.named[name], varying=True)
        self._ids = {name: id(tensor) for name, tensor in tensors.items()}

    def note(self, tensor: Tensor, axes: Axes, *, varying: bool) -> None:
        """These are the tensor's axes; `varying` if its values depend on inputs or parameters."""
        self._known[id(tensor)] = tensor, axes, varying

    def axes(self, tensor: Tensor) -> Axes:
        """The tensor's axes; those of one that was not seen made, a constant, are fixed."""
        if id(tensor) not in self._known:
            self.note(tensor, placed(tensor.shape), varying=False)
        self._used.add(id(tensor))
        return self._known[id(tensor)][1]

    def entered(self, name: str) -> None:
        """A module's forward begins."""
        self._inside.append(name)

    def left(self, name: str, output: Any) -> None:
        """A module's forward is over."""
        self._inside.pop()
        known = self._known.get(id(output))
        self.outputs.append(known[1] if known else None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do the operation, and conclude what it says about the axes of its results."""
        names = [argument.name for argument in func._schema.arguments]
        values = {argument.name: argument.default_value for argument in func._schema.arguments}
        values |= dict(zip(names, args, strict=False)) | (kwargs or {})
        given = _tensors(list(values.values()))
        varying = any(self._known[id(t)][2] for t in given if id(t) in self._known)
        if varying and func._schema.name.removeprefix("aten::") in _READS_VALUES:
            raise ValueError(
                f"risk: expected a forward pass that is the same for every batch, got one that reads a tensor's values "
                f"({self._where(func)}), so units cannot be told apart safely; take the data-dependent branch out"
            )
        output = func(*args, **(kwargs or {}))
        results = _tensors(output if isinstance(output, tuple | list) else [output])
        for tensor, axes in zip(results, self._conclude(func, values, given, results), strict=True):
            self.note(tensor, axes, varying=varying)
        return output

    def _conclude(self, func: Any, values: dict[str, Any], given: list[Tensor], results: list[Tensor]) -> list[Axes]:
        rule, shapes = _rule_for(func), [tuple(tensor.shape) for tensor in results]
        axes = None if rule is None else rule({name: self._as_axes(value) for name, value in values.items()}, shapes)
        if axes is None:
            met = [axis for tensor in given for axis in self.axes(tensor)]
            if not all(atom.fixed for axis in met for atom in atoms(axis)):
                self.unknown[self._where(func)] = None
            fix(*met)
            return [placed(shape) for shape in shapes]
        # Further axes are of what the operation computes inside (sums of a softmax): held only to be looked at.
        for inner in axes[len(results) :]:
            self.note(torch.empty(0), inner, varying=False)
        return axes[: len(results)]

    def _as_axes(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.axes(value)
        if isinstance(value, list | tuple):
            return [self._as_axes(item) for item in value]
        return value

    def _where(self, func: Any) -> str:
        module = next((name for name in reversed(self._inside) if name), "the model itself")
        return f"{module}: {func._schema.name}"

    def specification(self) -> PermutationSpec:
        """What was found, after the pass."""
        for name, axes in self.named.items():
            if self._ids[name] not in self._used:
                fix(*axes)  # no part of the function
        return specification(self.named, [axes for _, axes, _ in self._known.values()], self.outputs, self.unknown)


def _rule_for(function: Any) -> Rule | None:
    """The rule for an operation of torch's dispatcher, in place or not; None where there is none."""
    name = function._schema.name.removeprefix("aten::")
    name = name if name in RULES else name.removesuffix("_")
    if name in RULES:
        return RULES[name]
    return pointwise if torch.Tag.pointwise in function.tags else None


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found
