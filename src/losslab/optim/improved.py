"""The founding interface: an optimizer that is given the model and does forward, backward and update in one `step`.

`from talt import ImprovedTALTOptimizer, TALTOptimizer, create_enhanced_talt_config` finds it under its first name.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from losslab.optim.attach import shape_gradients
from losslab.optim.eigenspace.checks import nearest
from losslab.optim.eigenspace.options import FIRST_VERSION, FIXES, TALTOptions
from losslab.optim.groups import excluded, talt_param_groups
from losslab.optim.talt import TALT

# What the founders called it -> what it is here. Other names of theirs are refused: they did nothing, or worked around
# what this implementation does not have.
FOUNDERS = {
    "memory_size": "base_memory",
    "eigenspace_memory_size": "base_memory",
    "topology_update_interval": "update_interval",
    "smoothing_factor": "damping",
    "eigenspace_blend_factor": "blend",
    "use_adaptive_memory": "adaptive_memory",
    "use_adaptive_thresholds": "statistical_thresholds",
    "use_gradient_smoothing": "gradient_smoothing",
    "use_incremental_covariance": "incremental_covariance",
    "use_parameter_normalization": "parameter_normalization",
}
BASES = ("weight_decay", "eps", "momentum", "nesterov", "maximize", "fused", "foreach")  # of a base optimizer
PRECISIONS = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}


def create_enhanced_talt_config() -> dict[str, Any]:
    """Keyword arguments of `ImprovedTALTOptimizer`: all eight fixes on, whether or not each earns its keep."""
    return {"lr": 1e-2, **dict.fromkeys(FIXES, True)}


class ImprovedTALTOptimizer(Optimizer):
    """TALT on a base optimizer, called with the loss function and a batch.

    Its `param_groups` are the base optimizer's, so that learning-rate schedules and `zero_grad` work on it.

    Args:
        model: Its matrices and kernels get eigenspaces, the rest is treated as by Adam (`talt_param_groups`).
        base_optimizer: Takes parameters and `lr`, such as `torch.optim.SGD`; it steps along TALT's updates.
        lr: The base optimizer's, on AdamW's scale with SGD.
        betas: How much of the averages of the gradient and of its square is kept.
        structure: Of matrices and kernels.
        mixed_precision: "bf16" or "fp16" inside the model's operations, the latter with a scaled loss; None for none.
        gradient_clip_norm: Largest norm of the gradient before it is shaped; None does not clip.
        settings: `TALTOptions`' names, or the founders' names for them.

    Raises:
        ValueError: A setting is unknown or not possible.
    """

    def __init__(
        self,
        model: nn.Module,
        base_optimizer: Callable[..., Optimizer] = SGD,
        *,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.99),
        structure: str = "auto",
        mixed_precision: str | None = None,
        gradient_clip_norm: float | None = None,
        **settings: Any,
    ) -> None:
        if mixed_precision not in PRECISIONS:
            raise ValueError(f"mixed_precision: expected None, 'bf16' or 'fp16', got {mixed_precision!r}")
        if not callable(base_optimizer):
            raise TypeError(f"base_optimizer: expected a class such as torch.optim.SGD, got {base_optimizer!r}")
        found = _ours(settings)
        betas = found.pop("betas", betas)
        options = TALTOptions(**found)
        self.model, self.gradient_clip_norm, self._precision = model, gradient_clip_norm, PRECISIONS[mixed_precision]
        groups = talt_param_groups(model, excluded(structure))
        self.talt = TALT(groups, 0.0, betas=betas, structure=structure, options=options)
        self.base = base_optimizer(model.parameters(), lr=lr)
        self.scaler = torch.amp.GradScaler(_device(model), enabled=mixed_precision == "fp16")
        super().__init__(self.base.param_groups, {})
        self._share()

    def step(  # type: ignore[override]
        self, loss_fn: Callable[..., Tensor], batch: Any, targets: Any = None
    ) -> tuple[float, Any]:
        """Forward, backward and one update.

        Args:
            loss_fn: Of the model's output and the targets; of the output alone where there are none.
            batch: The model's input; the arguments of a tuple or list, the keyword arguments of a mapping.
            targets: See `loss_fn`.

        Returns:
            The loss, and the model's output.
        """
        self.zero_grad()
        with torch.enable_grad():
            with torch.autocast(_device(self.model), self._precision, enabled=self._precision is not None):
                output = _forward(self.model, batch)
                loss = loss_fn(output) if targets is None else loss_fn(output, targets)
            self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.base)
        if self.gradient_clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.gradient_clip_norm)
        if shape_gradients(self.talt) or self.scaler.is_enabled():  # the scaler passes over overflows itself
            self.scaler.step(self.base)
        self.scaler.update()
        return loss.item(), output

    step_complex = step

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Not after the optimizer was made: the model says which parameters get an eigenspace.

        Raises:
            RuntimeError: If it is.
        """
        if self.state is self.base.state:  # so once it is made
            raise RuntimeError("add_param_group: expected the model's own parameters only; make a new optimizer")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """Refused: a copy would train the same model."""
        raise TypeError("ImprovedTALTOptimizer: cannot be copied or pickled; save its state_dict()")

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's, with TALT's and the loss scale beside it."""
        return {**self.base.state_dict(), "talt": self.talt.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: It is another optimizer's.
        """
        lacking = {"state", "param_groups", "talt", "scaler"} - set(state_dict)
        if lacking:
            raise ValueError(f"state_dict: expected one of ImprovedTALTOptimizer, got one without {min(lacking)!r}")
        self.base.load_state_dict({name: state_dict[name] for name in ("state", "param_groups")})
        self.talt.load_state_dict(state_dict["talt"])
        self.scaler.load_state_dict(state_dict["scaler"])
        self._share()

    def _share(self) -> None:
        self.param_groups, self.state = self.base.param_groups, self.base.state


class TALTOptimizer(ImprovedTALTOptimizer):
    """The first version: no fix is on, ten directions of each flat gradient, fixed thresholds. To be compared with.

    Args:
        model: The network.
        base_optimizer: As in `ImprovedTALTOptimizer`.
        settings: Likewise; they stand before those of the first version.
    """

    def __init__(self, model: nn.Module, base_optimizer: Callable[..., Optimizer] = SGD, **settings: Any) -> None:
        super().__init__(model, base_optimizer, **{**FIRST_VERSION, **_ours(settings)})


def _ours(settings: Mapping[str, Any]) -> dict[str, Any]:
    known = {field.name for field in fields(TALTOptions)}
    other = {"lr", "betas", "structure", "mixed_precision", "gradient_clip_norm"}
    found = {FOUNDERS.get(name, name): value for name, value in settings.items()}
    if "smoothing_beta" in found:
        found["betas"] = (found.pop("smoothing_beta"), 0.99)
    for name in found:
        if name not in known | other:
            text = "; it is the base optimizer's: base_optimizer=functools.partial(torch.optim.SGD, …)"
            asked = text if name in BASES else nearest(name, sorted({*known, *other, *FOUNDERS}))
            raise ValueError(f"{name}: no such setting{asked}")
    return found


def _device(model: nn.Module) -> str:
    parameter = next(model.parameters(), None)
    return "cpu" if parameter is None else parameter.device.type


def _forward(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)
