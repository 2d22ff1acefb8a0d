"""TALT: Adam's statistics in the eigenspace of the gradient's covariance, with a gain for its valleys.

Each tensor is a matrix; the covariance of its gradient is nearly a Kronecker product of one matrix for each side
(Gupta et al. 2018). In the bases of these two, the averaged square of the rotated gradient estimates the covariance's
eigenvalues λ (as in SOAP, Vyas et al. 2024), and each direction moves by its averaged gradient times a response s(λ)
that falls with λ. `talt_reference` has it in equations, docs/talt.md in words and pictures.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from losslab.optim.eigenspace.layout import Layout, layout, new_state
from losslab.optim.eigenspace.options import STRUCTURES, TALTOptions, of_group, plain
from losslab.optim.eigenspace.stack import Stack
from losslab.optim.eigenspace.update import update


class TALT(Optimizer):
    """Topology-Aware Learning Trajectory.

    All work is done in `step()`: schedules, clipping, accumulation, GradScaler and DistributedDataParallel are used as
    with any optimizer. The state is float32, or float64 for parameters that are, and stays so through
    `load_state_dict`. A step at which any gradient is not finite changes nothing and is counted in `skipped`.

    Args:
        params: Tensors or groups; a group may set anything that is set here, and each of `TALTOptions`' names.
        lr: Learning rate, on AdamW's scale.
        betas: How much of the averages of the gradient and of its square is kept.
        eps: Added to the root of the square, as in Adam.
        weight_decay: Apart from the gradient, times the learning rate.
        structure: "kronecker" for tensors of two axes and more and "diagonal" for others is "auto"; "lowrank" keeps a
            few directions of the flat gradient; "polar" no covariance at all, its update is Muon's.
        options: The eight fixes, and their numbers.
        maximize: Whether to go uphill.

    Cost: for a matrix m×n, 6mn(m + n) operations a step and, each time the bases are renewed, about 6(m³ + n³);
    numbers of state 2mn + 2m² + 2n² (`state_numbers`).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 3e-3,
        *,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        structure: str = "auto",
        options: TALTOptions | None = None,
        maximize: bool = False,
    ) -> None:
        own = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "structure": structure}
        self._where: dict[Tensor, Stack] = {}
        super().__init__(params, {**own, "maximize": maximize, "skipped": 0, **plain(options or TALTOptions())})
        self._remember_precision()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with settings of their own or the defaults.

        Raises:
            ValueError: A setting is unknown or not possible, or a parameter is complex.
        """
        unknown = set(param_group) - {"params", "param_names", "initial_lr"} - set(self.defaults)
        if unknown:
            raise ValueError(f"{min(unknown)}: TALT has no such setting; expected one of {', '.join(self.defaults)}")
        _check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.is_complex():
                self.param_groups.pop()
                raise ValueError(f"params: expected real tensors, got {parameter.dtype}; use torch.view_as_real")

    @property
    def skipped(self) -> int:
        """Steps at which a gradient was not finite."""
        return max(group["skipped"] for group in self.param_groups)

    def state_numbers(self) -> int:
        """How many numbers the state of all parameters takes; none of them need be there yet."""
        return sum(
            self._layout(parameter, group).numbers
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.requires_grad
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step at the gradients that are there, or that `closure` computes; its result.

        Raises:
            RuntimeError: A gradient is sparse, or a part of one that is spread over several devices.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        present = [
            (group, [parameter for parameter in group["params"] if _has_gradient(parameter)])
            for group in self.param_groups
        ]
        norms = _norms([parameter.grad for _, moved in present for parameter in moved])
        if not all(map(math.isfinite, norms)):
            for group in self.param_groups:
                group["skipped"] += 1
            return loss
        length = iter(norms)
        for group, moved in present:
            self._step_group(group, moved, {parameter: next(length) for parameter in moved})
        return loss

    def _step_group(self, group: dict[str, Any], moved: list[Tensor], norms: dict[Tensor, float]) -> None:
        options = of_group(group)
        updates = []
        for members, stack in self._stacks(group, moved, options):
            shape = (stack.layout.left.length, stack.layout.right.length)
            dtype = stack.state["exp_avg"].dtype
            G = torch.stack([parameter.grad.reshape(shape).to(dtype) for parameter in members])  # type: ignore[union-attr]
            if group["maximize"]:
                G = -G
            U = update(stack, stack.in_units(G, [norms[p] for p in members]), group["betas"], group["eps"], options)
            updates += [(p, u.reshape(p.shape).to(p.dtype)) for p, u in zip(members, U.unbind(), strict=True)]
        if not updates:
            return
        parameters, steps = (list(values) for values in zip(*updates, strict=True))
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, steps, alpha=-group["lr"])

    def _layout(self, parameter: Tensor, group: dict[str, Any], options: TALTOptions | None = None) -> Layout:
        width = 8 if parameter.dtype == torch.float64 else 4
        return layout(parameter.shape, group["structure"], options or of_group(group), width)

    def _stacks(
        self, group: dict[str, Any], moved: list[Tensor], options: TALTOptions
    ) -> Iterable[tuple[list[Tensor], Stack]]:
        """The parameters by layout, device, precision and age, each with its state; made where there is none yet."""
        alike: dict[Any, list[Tensor]] = {}
        for parameter in moved:
            if not parameter.numel():
                continue
            of = self._layout(parameter, group, options)
            if not self.state[parameter]:
                self.state[parameter].update(new_state(of, parameter))
            age = self._where[parameter].step if parameter in self._where else int(self.state[parameter]["step"])
            key = (of, parameter.device, parameter.dtype == torch.float64, age)
            alike.setdefault(key, []).append(parameter)
        for (of, *_), members in alike.items():
            yield members, self._stack(members, of)

    def _stack(self, members: list[Tensor], of: Layout) -> Stack:
        stack = self._where.get(members[0])
        whole = stack is not None and len(stack.units) == len(members)
        if stack is None or not whole or any(self._where.get(member) is not stack for member in members):
            stack = Stack.of([self.state[member] for member in members], of)
            self._where.update(dict.fromkeys(members, stack))
        return stack

    def _remember_precision(self) -> None:
        """Keep the state's precision where torch would cast it to the parameters': around `load_state_dict`."""
        kept: dict[str, Any] = {}

        def before(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
            del optimizer
            kept["state"] = state_dict["state"]

        def after(optimizer: Optimizer) -> None:
            states = kept.pop("state")
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for index, state in states.items():
                parameter = parameters[index]
                optimizer.state[parameter] = {
                    name: value.clone() if name == "step" else value.detach().to(parameter.device, copy=True)
                    for name, value in state.items()
                }
            self._where.clear()

        def apart(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
            """Without the views into stacks: each tensor on its own."""
            del optimizer
            state_dict["state"] = {
                index: {name: value.clone() for name, value in state.items()}
                for index, state in state_dict["state"].items()
            }

        self.register_load_state_dict_pre_hook(before)
        self.register_load_state_dict_post_hook(after)
        self.register_state_dict_post_hook(apart)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy or an unpickled optimizer, and inside `load_state_dict`."""
        super().__setstate__(state)
        self._where = {}


def _has_gradient(parameter: Tensor) -> bool:
    gradient = parameter.grad
    if gradient is None:
        return False
    if gradient.is_sparse:
        raise RuntimeError("TALT: expected a dense gradient, got a sparse one; embeddings: sparse=False")
    if type(gradient).__name__ == "DTensor":
        raise RuntimeError("TALT: expected whole gradients, got a DTensor; docs/talt.md says how to use FSDP")
    return True


def _norms(gradients: Sequence[Tensor | None]) -> list[float]:
    """The gradients' lengths, with one wait for the device."""
    if not gradients:
        return []
    found = torch._foreach_norm([g.float() if g.dtype in (torch.float16, torch.bfloat16) else g for g in gradients])
    return torch.stack([norm.double().to(found[0].device) for norm in found]).tolist()


def _check(group: dict[str, Any]) -> None:
    lr, betas = group["lr"], group["betas"]
    if not isinstance(lr, Tensor) and not lr >= 0:
        raise ValueError(f"lr: expected a number >= 0, got {lr!r}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):  # noqa: PLR2004
        raise ValueError(f"betas: expected two numbers from 0 to below 1, got {betas!r}")
    for name in ("eps", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"{name}: expected a number >= 0, got {group[name]!r}")
    if group["structure"] not in STRUCTURES:
        raise ValueError(f"structure: expected one of {', '.join(STRUCTURES)}, got {group['structure']!r}")
    TALTOptions(**{field.name: group[field.name] for field in fields(TALTOptions)})
