"""TALT in front of any optimizer of torch: gradients are shaped just before its step."""

from typing import Any

import torch
from torch.optim import Optimizer

from losslab.optim.eigenspace.options import TALTOptions
from losslab.optim.talt import TALT


class Attachment:
    """What `attach_talt` has attached.

    Attributes:
        talt: Shapes the gradients; its `state_dict` is to be saved beside the optimizer's.
    """

    def __init__(self, optimizer: Optimizer, talt: TALT) -> None:
        self.talt = talt
        self._hook = optimizer.register_step_pre_hook(self._before)

    def remove(self) -> None:
        """From now on the optimizer sees raw gradients."""
        self._hook.remove()

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        known = {parameter for group in self.talt.param_groups for parameter in group["params"]}
        if any(parameter not in known for group in optimizer.param_groups for parameter in group["params"]):
            raise RuntimeError("attach_talt: the optimizer has new parameters; remove() the attachment and attach anew")
        if any(callable(value) for value in (*args, *kwargs.values())):
            raise RuntimeError(
                "attach_talt: expected step() without a closure, got one: its gradients would come after TALT; "
                "call backward() first, or use losslab.optim.TALT itself"
            )
        if getattr(optimizer, "grad_scale", None) is not None:  # fused optimizers unscale in their own step
            raise RuntimeError("attach_talt: expected gradients without a loss scale; call scaler.unscale_(optimizer)")
        if not shape_gradients(self.talt):
            for parameter in known:
                parameter.grad = None  # optimizers pass over what has no gradient: this step changes nothing


def attach_talt(
    optimizer: Optimizer,
    *,
    betas: tuple[float, float] = (0.9, 0.99),
    structure: str = "auto",
    options: TALTOptions | None = None,
) -> Attachment:
    """Let an optimizer step along TALT's updates in place of gradients.

    Updates are about as long as AdamW's, so that SGD takes AdamW's learning rates, or a few times these. An optimizer
    that divides by the gradient's size itself, such as Adam, undoes TALT's gains: there it only sees other axes. One
    that has momentum averages a second time; `options.gradient_smoothing=False` leaves that to it.

    Args:
        optimizer: Any that takes its gradients from `.grad`, by `step()` without a closure. Its groups are TALT's, with
            the structures of `talt_param_groups`, if they were made by it: `SGD(talt_param_groups(model), lr=5e-3)`.
            A step at which a gradient is not finite finds none at all.
        betas: How much of the averages of the gradient and of its square is kept.
        structure: As in `TALT`, of groups that have none.
        options: Likewise.

    Returns:
        The attachment; `remove()` ends it.

    Raises:
        TypeError: What is no optimizer.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    kept = ("params", "structure")
    groups = [{name: group[name] for name in kept if name in group} for group in optimizer.param_groups]
    return Attachment(optimizer, TALT(groups, lr=0.0, betas=betas, structure=structure, options=options))


@torch.no_grad()
def shape_gradients(talt: TALT) -> bool:
    """Replace each `.grad` by TALT's update; where one is not finite, all stay as they are. Whether all were."""
    before = talt.skipped
    for _, updates in talt.updates():
        for parameter, update in updates:
            assert parameter.grad is not None
            parameter.grad.copy_(update)
    return talt.skipped == before
