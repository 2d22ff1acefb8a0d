"""TALT: Adam's statistics in the eigenspace of the gradient's covariance, with a gain for its valleys.

Each tensor is a matrix; the covariance of its gradient is nearly a Kronecker product of one matrix for each side
(Gupta et al. 2018). In the bases of these two, the averaged square of the rotated gradient estimates the covariance's
eigenvalues λ (as in SOAP, Vyas et al. 2024), and each direction moves by its averaged gradient times a response s(λ)
that falls with λ. `talt_reference` has it in equations, docs/talt.md in words and pictures.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from losslab.optim.diagnostics.recorder import TALTDiagnostics
from losslab.optim.eigenspace.checks import is_number
from losslab.optim.eigenspace.gradients import matrices, moved, sizes
from losslab.optim.eigenspace.group_checks import require_own, require_possible
from losslab.optim.eigenspace.layout import as_tensor, turned
from losslab.optim.eigenspace.options import TALTOptions, of_group, plain
from losslab.optim.eigenspace.plans import Plans, layout_of
from losslab.optim.eigenspace.update import update
from losslab.optim.probe import step_curvature

WARN_ABOVE = 0.5  # of forward and backward
YOUNGER = {"orthogonal": False, "update_ramp": 10}  # options that states of before do not name, as they were then


class TALT(Optimizer):
    """Topology-Aware Learning Trajectory.

    All work is done in `step()`: schedules, clipping, accumulation, GradScaler and DistributedDataParallel are used as
    with any optimizer. The state is float32, or float64 for parameters that are, and stays so through
    `load_state_dict`. A step at which any gradient is not finite changes nothing and is counted in `skipped`.

    Args:
        params: Tensors or groups; a group may set anything that is set here, and each of `TALTOptions`' names.
        lr: Learning rate: updates are about as long as AdamW's. Tuned on six small tasks it is 0.01 to 0.04.
        betas: How much of the averages of the gradient and of its square is kept.
        eps: Added to the root of the square, as in Adam.
        weight_decay: Apart from the gradient, times the learning rate.
        structure: "kronecker" for tensors of two axes and more and "diagonal" for others is "auto"; "lowrank" keeps a
            few directions of the flat gradient; "polar" no covariance at all, its update is Muon's.
        options: The eight fixes, and their numbers.
        maximize: Whether to go uphill.
        tokens: Examples × positions of a step, if it is to be told where eigenspaces cost more than half as much as
            forward and backward.
        probe: Computes a batch's loss; every `probe_interval` steps one Hessian product along the way then has a say in
            fix 7: near a minimum the loss curves up there. A covariance cannot tell a minimum from a saddle.

    Cost: for a matrix m×n, 6mn(m + n) + 24mn·min(m, n) operations a step, the latter 10mn·min(m, n) where one side is
    nine times the other, and, with new bases, about 6(m³ + n³);
    numbers of state 2mn + 2m² + 2n² (`state_numbers`).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 5e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        structure: str = "auto",
        options: TALTOptions | None = None,
        maximize: bool = False,
        tokens: int | None = None,
        probe: Callable[[], Tensor] | None = None,
    ) -> None:
        if options is not None and not isinstance(options, TALTOptions):
            raise TypeError(f"options: expected TALTOptions, got {type(options).__name__}; TALTOptions(max_side=64)")
        own = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "structure": structure}
        if probe is not None and not callable(probe):
            raise TypeError(f"probe: expected a function that computes a loss, got {type(probe).__name__}")
        if tokens is not None and not (is_number(tokens) and 0 < tokens < math.inf):
            raise ValueError(f"tokens: expected None or a number > 0, got {tokens!r}")
        self._plans, self.probe, self.tokens = Plans(), probe, tokens
        self._loading: dict[str, Any] = {}
        super().__init__(params, {**own, "maximize": maximize, "skipped": 0, **plain(options or TALTOptions())})
        if probe is not None and not any(group["selective_amplification"] for group in self.param_groups):
            warnings.warn("TALT: nothing asks the probe; selective_amplification=True does", stacklevel=2)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with settings of their own or the defaults.

        Raises:
            ValueError: A setting is unknown or not possible, or a parameter is complex.
        """
        require_possible(param_group, self.defaults)
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if parameter.is_complex():
                self.param_groups.pop()
                raise ValueError(f"params: expected real tensors, got {parameter.dtype}; use torch.view_as_real")
        self._warn_of_cost(self.param_groups[-1])

    def _warn_of_cost(self, group: dict[str, Any]) -> None:
        if self.tokens is None:
            return
        shapes = [(layout_of(p, group, of_group(group)).overhead, tuple(p.shape)) for p in group["params"] if p.numel()]
        overhead, shape = max(shapes, default=(0.0, ()))
        if overhead > WARN_ABOVE * self.tokens:
            warnings.warn(
                f"TALT: a step of {shape} costs {overhead / self.tokens:.2g} times its forward and backward pass at "
                f"{self.tokens} tokens; larger batches, a smaller max_side, or structure='diagonal' for it",
                stacklevel=3,
            )

    @property
    def skipped(self) -> int:
        """Steps at which a gradient was not finite."""
        return max(group["skipped"] for group in self.param_groups)

    def state_numbers(self) -> int:
        """How many numbers the state of all parameters takes; none of them need be there yet."""
        return sum(
            layout_of(parameter, group, of_group(group)).numbers
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.requires_grad and parameter.numel()
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
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):  # of the closure's loop
            found = self.updates()
        for group, updates in found:
            parameters, steps = (list(values) for values in zip(*updates, strict=True))
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, steps, alpha=-group["lr"])
        return loss

    @torch.no_grad()
    def updates(self) -> list[tuple[dict[str, Any], list[tuple[Tensor, Tensor]]]]:
        """What a step of length 1 would take off: for each group, its parameters with their updates.

        The state is one step on; the parameters stay. Nothing, where a gradient is not finite.
        """
        present = moved(self.param_groups)
        everything = [parameter for _, parameters in present for parameter in parameters]
        found_sizes = sizes(everything)
        if not all(map(math.isfinite, found_sizes)):
            for group in self.param_groups:
                group["skipped"] += 1
            return []
        # All of them before any state moves on, should a group's settings have become impossible.
        stacked = [self._plans.stacks(i, group, tuple(some), self.state) for i, (group, some) in enumerate(present)]
        self._probe_curvature()
        size = dict(zip(everything, found_sizes, strict=True))
        found = []
        for (group, _), stacks in zip(present, stacked, strict=True):
            updates = []
            for members, stack in stacks:
                G = -matrices(members, stack) if group["maximize"] else matrices(members, stack)
                G = stack.in_units(G, [size[parameter] for parameter in members])
                U = update(stack, G, group["betas"], group["eps"], stack.options)
                updates += [(p, as_tensor(u, p)) for p, u in zip(members, stack.apart(U), strict=True)]
            if updates:
                found.append((group, updates))
        return found

    def _probe_curvature(self) -> None:
        """Fix 7's Hessian product, when it is due: does the loss curve up along the averaged gradient over √λ?

        Along the lowest eigenvalues alone, as the rule was first meant, it misses most saddles
        (benchmarks/results/talt_phase.md).
        """
        if self.probe is None:
            return
        steps = [int(state["step"]) for state in self.state.values() if "step" in state]
        asking = [group["probe_interval"] for group in self.param_groups if group["selective_amplification"]]
        if not asking or not steps or max(steps) == 0 or max(steps) % min(asking):
            return
        device = next(iter(self.state)).device
        curvature = torch.tensor(step_curvature(self, self.probe), device=device)
        if dist.is_available() and dist.is_initialized():  # all ranks decide alike
            dist.all_reduce(curvature)
        for state in self.state.values():
            if "rising" in state:
                state["rising"].fill_(float(curvature > 0))

    def diagnostics(self, **settings: Any) -> TALTDiagnostics:
        """What does it see, and what does it do?  `TALTDiagnostics(self, **settings)`, every 100th step."""
        return TALTDiagnostics(self, **settings)

    def state_dict(self) -> dict[str, Any]:
        """As every optimizer's; tensors and plain values only, each tensor on its own rather than a part of a stack."""
        self._plans.settle()
        found = super().state_dict()
        found["state"] = {
            index: {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}
            for index, state in found["state"].items()
        }
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer does, but that the state stays as precise as it was saved."""
        hook = self.register_load_state_dict_pre_hook(lambda _, found: require_own(found))
        # The last ones, so that they see what other hooks have made of the dictionary.
        also = self.register_load_state_dict_pre_hook(lambda _, found: self._loading.update(found))
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
            also.remove()
            self._loading = {}

    def _keep_precision(self) -> None:
        """Put the state as it was saved in place of what torch has cast to the parameters' precision."""
        given = self._loading
        saved = [index for group in given["param_groups"] for index in group["params"]]
        own = [(parameter, group) for group in self.param_groups for parameter in group["params"]]
        for index, (parameter, group) in zip(saved, own, strict=True):
            if index in given["state"]:
                state = {
                    name: value.to("cpu" if name == "step" else parameter.device, copy=True)
                    if isinstance(value, Tensor)
                    else value
                    for name, value in given["state"][index].items()
                }
                self.state[parameter] = turned(state, layout_of(parameter, group, of_group(group)))

    def __getstate__(self) -> dict[str, Any]:
        """For a copy, or to be pickled."""
        self._plans.settle()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy or an unpickled optimizer, and inside `load_state_dict`."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in YOUNGER.items():
                group.setdefault(name, value)
        self._plans = Plans()
        self.probe, self.tokens = getattr(self, "probe", None), getattr(self, "tokens", None)
        self._loading = getattr(self, "_loading", {})
        if self._loading:
            self._keep_precision()  # here, so that post-load hooks find it
