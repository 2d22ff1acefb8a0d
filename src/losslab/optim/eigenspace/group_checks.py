"""What a parameter group of TALT may hold, and whose state it is."""

import math
from typing import Any

from torch import Tensor

from losslab.optim.eigenspace.checks import is_number, nearest
from losslab.optim.eigenspace.options import STRUCTURES, of_group

# What torch, its schedules and people's own code write into parameter groups.
OF_OTHERS = {"params", "param_names", "name", "lr_scale", "initial_lr", "max_lr", "min_lr", "swa_lr"}
OF_OTHERS |= {"base_momentum", "max_momentum"}


def require_possible(given: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Refuse a parameter group with a setting that is unknown, or not possible.

    Raises:
        ValueError: It names the setting.
    """
    if unknown := set(given) - OF_OTHERS - set(defaults):
        name, known = min(unknown), ", ".join(defaults)
        raise ValueError(f"{name}: TALT has no such setting; expected one of {known}{nearest(name, defaults)}")
    group = {**defaults, **given}
    lr, betas = group["lr"], group["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr: expected one number, got a tensor of shape {tuple(lr.shape)}")
    if not isinstance(lr, Tensor) and not (is_number(lr) and 0 <= lr < math.inf):
        raise ValueError(f"lr: expected a number >= 0, got {lr!r}")
    if not isinstance(betas, tuple | list) or len(betas) != 2 or not all(is_number(b) and 0 <= b < 1 for b in betas):
        raise ValueError(f"betas: expected two numbers from 0 to below 1, got {betas!r}")
    for name in ("eps", "weight_decay"):
        if not (is_number(group[name]) and 0 <= group[name] < math.inf):
            raise ValueError(f"{name}: expected a number >= 0, got {group[name]!r}")
    if group["structure"] not in STRUCTURES:
        raise ValueError(f"structure: expected one of {', '.join(STRUCTURES)}, got {group['structure']!r}")
    of_group(group)


def require_own(state_dict: dict[str, Any]) -> None:
    """Refuse another optimizer's state: its groups lack what TALT's have."""
    lacking = {name for group in state_dict["param_groups"] for name in ("structure", "skipped") if name not in group}
    if lacking:
        raise ValueError(
            f"state_dict: expected one of a TALT, got groups without {min(lacking)!r}; another optimizer's averages "
            "cannot be taken over, begin with a new TALT"
        )
