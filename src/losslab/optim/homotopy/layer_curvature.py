"""The curvature of each layer again and again along a training, from one gradient graph."""

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from torch import Tensor

from losslab.optim.homotopy.batch_hessian import BatchHessian, Loss, Root, Tensors
from losslab.optim.homotopy.blocks import JointPower, diagonal_blocks
from losslab.optim.homotopy.checks import one_of
from losslab.optim.homotopy.curvature import Curvature, CurvatureEstimator, require_measurable
from losslab.ranks import ALONE, Ranks

Method = Literal["blocks", "joint"]


class LayerCurvature:
    """How curved is the loss along each layer?

    Args:
        estimator: Of which each layer has a copy, with a vector of its own.
        method: "blocks" is ‖H_bb‖ of each layer's block; "joint" ρ_b of all together (`JointPower`).

    Raises:
        ValueError: An unknown method.
    """

    def __init__(self, estimator: CurvatureEstimator, method: Method) -> None:
        one_of("method", method, get_args(Method))
        if method == "joint" and (estimator.num_samples or estimator.top_k or estimator.method != "power"):
            raise ValueError(
                "estimator: expected power iteration alone, without num_samples and top_k, with method='joint'; "
                "method='blocks' takes them"
            )
        self.method, self._template, self._joint = method, estimator, JointPower(estimator.generator)
        self._estimators: dict[str, CurvatureEstimator] = {}
        self._differences = False

    def __call__(
        self,
        loss: Loss,
        layers: Mapping[str, Sequence[Tensor]],
        root: Callable[[Tensors], Root | None] | None = None,
        ranks: Ranks = ALONE,
    ) -> dict[str, Curvature]:
        """Estimate it now, in the layers' order.

        Args:
            loss: Of the present batch.
            layers: Names and trainable parameters.
            root: Makes P^(−½) for some of the parameters.
            ranks: Processes to average over.

        Cost: one gradient, and a product with each block, or with "joint" one with the whole Hessian.
        """
        everything = [parameter for members in layers.values() for parameter in members]
        require_measurable(everything)
        hessian = BatchHessian(loss, everything, ranks=ranks, differences=self._differences)
        apart = root if self.method == "blocks" else None  # "joint" multiplies with the whole matrix alone
        roots = [None if apart is None else apart(members) for members in layers.values()]
        blocks = diagonal_blocks(hessian, [len(members) for members in layers.values()], roots)
        if not (math.isfinite(hessian.loss) and math.isfinite(hessian.gradient_norm)):
            return {name: Curvature(hessian.loss, hessian.gradient_norm, math.nan) for name in layers}
        if self.method == "joint":
            hessian.root = None if root is None else root(everything)
            found = self._joint(hessian, blocks, self._template.power_iterations)
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "curvature: no second derivatives", UserWarning)  # B times
                found = [self._of(name).measure(block) for name, block in zip(layers, blocks, strict=True)]
        self._tell([hessian, *blocks])
        return dict(zip(layers, found, strict=True))

    def _of(self, layer: str) -> CurvatureEstimator:
        return self._estimators.setdefault(layer, copy.deepcopy(self._template))

    def _tell(self, hessians: Sequence[BatchHessian]) -> None:
        complaints = [hessian.complaint for hessian in hessians if hessian.complaint is not None]
        if complaints and not self._differences:
            self._differences = True
            text = f"curvature: no second derivatives ({complaints[0]}); products are differences of gradients"
            warnings.warn(f"{text}, wrong by some percent in float32", stacklevel=4)

    def forget(self) -> None:
        """Begin with random vectors: the layers are others."""
        self._joint.vector = None

    def state_dict(self) -> dict[str, Any]:
        """Tensors and names."""
        return {
            "method": self.method,
            "joint": self._joint.state_dict(),
            "layers": {name: estimator.state_dict() for name, estimator in self._estimators.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`.

        Raises:
            ValueError: It is of another method.
        """
        if state.get("method", self.method) != self.method:
            raise ValueError(f"state_dict: expected one with method={self.method!r}, got {state['method']!r}")
        self._joint.load_state_dict(state["joint"])
        self._estimators = {}
        for name, estimator in state["layers"].items():
            self._of(name).load_state_dict(estimator)


def together(found: Mapping[str, Curvature], method: Method) -> Curvature:
    """Of all layers as one: the largest of their λ; the whole gradient's length."""
    estimates = list(found.values())
    return Curvature(
        estimates[0].loss,
        math.hypot(*(estimate.gradient_norm for estimate in estimates)),
        max(estimate.hessian_norm for estimate in estimates),
        products=(sum if method == "blocks" else max)(estimate.products for estimate in estimates),
    )
