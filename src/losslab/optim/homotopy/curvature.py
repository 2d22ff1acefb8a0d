"""How strongly is the loss curved where training is now?  ‖H‖, tr H, the first eigenvalues, and κ = ‖H‖/‖∇L‖²."""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from losslab.operators.risk import EmpiricalRisk
from losslab.optim.homotopy.batch_hessian import BatchHessian, Loss, Root
from losslab.optim.homotopy.checks import count, number, one_of
from losslab.random import gaussian, make_generator, rademacher
from losslab.ranks import ALONE, Ranks
from losslab.solvers.lanczos import eigenpairs
from losslab.solvers.power import power_iteration
from losslab.solvers.trace import trace
from losslab.status import Status

COLD_PRODUCTS = 10  # of the first call: a random start has forgotten itself by then
Method = Literal["power", "lanczos"]
Distribution = Literal["rademacher", "gaussian"]


@dataclass(frozen=True)
class Curvature:
    """What one estimate knows, of one batch.

    Attributes:
        loss: L.
        gradient_norm: ‖∇L‖.
        hessian_norm: ‖Hv‖ of the last unit vector v, never above ‖H‖; |λ| of largest magnitude once v has converged.
        hessian_residual: ‖Hv − λv‖, λ = vᵀHv: an eigenvalue lies within this distance of ±√(hessian_norm² − residual²).
        trace: tr H; NaN where it was not asked for.
        trace_error: Its standard error.
        eigenvalues: The largest in magnitude, in descending order of it; empty where they were not asked for, NaN where
            rounding left no symmetry to find them by.
        products: Hessian products used.
        status: Of the eigenvalue: one product of a warm start seldom converges.
    """

    loss: float
    gradient_norm: float
    hessian_norm: float
    hessian_residual: float = math.nan
    trace: float = math.nan
    trace_error: float = math.nan
    eigenvalues: tuple[float, ...] = ()
    products: int = 0
    status: Status = Status.complete

    @property
    def kappa(self) -> float:
        """κ = ‖H‖/‖∇L‖², in units of 1/loss; infinite where the gradient is zero and the Hessian is not."""
        if self.hessian_norm == 0:
            return 0.0
        square = self.gradient_norm * self.gradient_norm
        return self.hessian_norm / square if square != 0 else math.inf

    def plain(self) -> dict[str, Any]:
        """As plain values, for a state_dict."""
        return asdict(self) | {"status": str(self.status)}

    @classmethod
    def of_plain(cls, values: dict[str, Any]) -> "Curvature":
        """From `plain`."""
        return cls(**values | {"status": Status(values["status"]), "eigenvalues": tuple(values["eigenvalues"])})

    @property
    def finite(self) -> bool:
        """Whether loss, gradient and Hessian are finite."""
        return all(map(math.isfinite, (self.loss, self.gradient_norm, self.hessian_norm)))


class CurvatureEstimator:
    """Estimates the curvature again and again along a training, each time from where the last time ended.

    Args:
        power_iterations: Products for ‖H‖, at most. By default one: it goes on from the vector of the call before, and
            the Hessian has changed little since. The first call takes ten. The founders took 20 from a random start.
        num_samples: Vectors for tr H (Hutchinson 1990); 0 leaves it out. The founders took 10.
        distribution: Of these vectors: random signs, whose variance is the smallest, or normal numbers.
        top_k: Further eigenvalues, by Lanczos; 0 for none.
        method: Of ‖H‖: "power", or "lanczos" with `power_iterations` products from the last vector, which knows more
            after the same number but keeps as many vectors.
        tol: Relative residual at which fewer products are enough; of `top_k` too.
        seed: Of the first vector and of the trace's.

    Raises:
        ValueError: A number out of range, an unknown name.
    """

    def __init__(
        self,
        *,
        power_iterations: int = 1,
        num_samples: int = 0,
        distribution: Distribution = "rademacher",
        top_k: int = 0,
        method: Method = "power",
        tol: float = 1e-3,
        seed: int = 0,
    ) -> None:
        count("power_iterations", power_iterations, 1)
        count("num_samples", num_samples, 0)
        count("top_k", top_k, 0)
        one_of("distribution", distribution, get_args(Distribution))
        one_of("method", method, get_args(Method))
        number("tol", tol, 0, 1, open_low=True)
        self.power_iterations, self.num_samples, self.top_k = power_iterations, num_samples, top_k
        self.distribution, self.method, self.tol = distribution, method, tol
        self.generator = make_generator(seed)
        self._vector: Tensor | None = None
        self._differences = False  # whether second derivatives were missed once: then no more time is lost on them

    def __call__(
        self,
        loss: Loss | EmpiricalRisk,
        parameters: Sequence[Tensor] | Tensor | None = None,
        *,
        root: Root | None = None,
        ranks: Ranks = ALONE,
    ) -> Curvature:
        """Estimate it now.

        Args:
            loss: Computes the loss of the present batch, or of a slice of it, from the parameters; or a risk, whose
                loss is that of all its batches.
            parameters: Those that the loss is differentiated by; frozen ones are left out. By default a risk's own.
            root: P^(−½) of the optimizer's preconditioner: then all is of P^(−½)HP^(−½), but ‖∇L‖.
            ranks: Processes to average over.

        Returns:
            The curvature. A loss or a gradient that is not finite: NaN for the others, after no product.

        Cost: one gradient, and the products.

        Raises:
            TypeError: The loss is no tensor of one number.
            ValueError: No parameter requires a gradient; parameters that are complex, on several devices, or not of the
                risk's model.
        """
        if isinstance(loss, EmpiricalRisk):
            parameters, ranks, loss = _of_risk(loss, parameters), loss.ranks, _loss_of(loss)
        chosen = trainable([parameters] if isinstance(parameters, Tensor) else parameters or ())
        if not chosen:
            raise ValueError("parameters: expected at least one that requires a gradient, got none")
        require_measurable(chosen)
        return self.measure(BatchHessian(loss, chosen, root=root, ranks=ranks, differences=self._differences))

    def measure(self, hessian: BatchHessian) -> Curvature:
        """The same from a gradient that is there already."""
        loss, gradient_norm = hessian.loss, hessian.gradient_norm
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            return Curvature(loss, gradient_norm, math.nan, status=Status.nonfinite)
        found = self._norm(hessian)
        self._tell(hessian)
        if not math.isfinite(found["hessian_norm"]):
            return Curvature(loss, gradient_norm, **found)
        if self.num_samples:
            found |= self._trace(hessian)
            found["products"] += self.num_samples
        if self.top_k:
            k = min(self.top_k, hessian.size)
            try:
                pairs = eigenpairs(hessian, k, tol=self.tol, vectors=False, seed=self.generator)
                found["eigenvalues"] = tuple(map(float, pairs.values))
                found["products"] += pairs.matvecs
            except ValueError:  # P so uneven that rounding leaves no symmetry: no reason to end a training
                found["eigenvalues"] = (math.nan,) * k
        return Curvature(loss, gradient_norm, **found)

    def _norm(self, hessian: BatchHessian) -> dict[str, Any]:
        start = self._vector
        if start is None or start.shape != (hessian.size,):
            start = gaussian((hessian.size,), self.generator)
            products = max(self.power_iterations, COLD_PRODUCTS)
        else:
            products = self.power_iterations
        if self.method == "lanczos":
            pair = eigenpairs(hessian, 1, start=start.to(hessian.device), max_matvecs=products, tol=self.tol)
            assert pair.vectors is not None
            vector, value, residual = pair.vectors[:, 0], pair.values[0], pair.residuals[0]
            used, status = pair.matvecs, pair.status
        else:
            one = power_iteration(hessian, start=start, max_matvecs=products, tol=self.tol)
            vector, value, residual, used, status = one.vector, one.value, one.residual, one.matvecs, one.status
        if math.isfinite(value):
            self._vector = vector
        return {
            "hessian_norm": math.hypot(value, residual),  # ‖Hv‖: nearer to ‖H‖ than |λ| where v is a mixture
            "hessian_residual": float(residual),
            "products": used,
            "status": status,
        }

    def _tell(self, hessian: BatchHessian) -> None:
        if hessian.complaint is None or self._differences:
            return
        self._differences = True
        warnings.warn(
            f"curvature: no second derivatives ({hessian.complaint}); products are differences of gradients, "
            "wrong by some percent in float32",
            stacklevel=4,
        )

    def _trace(self, hessian: BatchHessian) -> dict[str, Any]:
        draw = rademacher if self.distribution == "rademacher" else gaussian
        vectors = draw((self.num_samples, hessian.size), self.generator)
        found = trace(hessian, method="hutchinson", vectors=vectors.to(hessian.device))
        return {"trace": found.value, "trace_error": found.standard_error}

    def state_dict(self) -> dict[str, Any]:
        """Tensors only: the vector, and where the random numbers stand."""
        vector = {} if self._vector is None else {"vector": self._vector.clone()}
        return {"generator": self.generator.get_state(), **vector}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.generator.set_state(state["generator"].cpu())
        self._vector = state["vector"].clone() if "vector" in state else None


def trainable(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Those that curvature is of: not frozen, and not empty."""
    return [parameter for parameter in parameters if parameter.requires_grad and parameter.numel()]


def require_measurable(parameters: Sequence[Tensor]) -> None:
    """Refuse parameters on several devices, and complex ones.

    Raises:
        ValueError: It says which.
    """
    devices = sorted({str(parameter.device) for parameter in parameters})
    if len(devices) > 1:
        raise ValueError(f"parameters: expected all on one device, got {', '.join(devices)}; measure some of them")
    for parameter in parameters:
        if parameter.is_complex():
            raise ValueError(f"parameters: expected real tensors, got {parameter.dtype}; use torch.view_as_real")


def _of_risk(risk: EmpiricalRisk, parameters: Sequence[Tensor] | Tensor | None) -> list[Tensor]:
    named = dict(risk.model.named_parameters())
    if parameters is None:
        return [named[name] for name in risk.space.names]
    parameters = [parameters] if isinstance(parameters, Tensor) else parameters
    own = set(named.values())
    if not own.issuperset(trainable(parameters)):
        raise ValueError("parameters: expected those of the risk's model, got others; `risk.to` has made a copy of it")
    return list(parameters)


def _loss_of(risk: EmpiricalRisk) -> Loss:
    """The risk's loss as a function of the model's own parameters; over processes, such that their mean is the loss."""
    parameters: dict[str, Tensor] = dict(risk.model.named_parameters())

    def loss() -> Tensor:
        with risk.evaluating():
            shares = [risk.batch_share(parameters, batch, count) for batch, count in risk.read()]
        return torch.stack(shares).sum() * risk.ranks.count

    return loss
