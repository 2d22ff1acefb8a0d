"""What will a spectrum cost? One product is timed, the rest is arithmetic."""

import time
from dataclasses import dataclass

import torch

from losslab.memory import peak_bytes
from losslab.operators.finite_difference import hessian_of
from losslab.operators.required import require_risk
from losslab.operators.risk import EmpiricalRisk
from losslab.operators.risk_operator import RiskOperator
from losslab.probes.spectrum import SpectrumOptions, basis_rows
from losslab.random import make_generator, rademacher


@dataclass(frozen=True)
class Plan:
    """Costs of one `spectrum` call, on the busiest process where there are several.

    Attributes:
        products: Products at most, where the eigenvalues converge within the density's nodes.
        seconds: For all of them.
        first_seconds: Of the first product, which builds the graphs.
        product_seconds: Of each later one.
        peak_bytes: Memory at the worst moment: what the process held at most up to the second product, and the basis.
        basis_bytes: Of that, the Krylov basis.
        graph_bytes: Of that, the gradient graphs kept.
        graphs_kept: How many batches' graphs are kept; the others are built again for each product.
        num_batches: Of how many.
        num_parameters: P.
        num_examples: N.
        processes: How many share the data and the basis.
    """

    products: int
    seconds: float
    first_seconds: float
    product_seconds: float
    peak_bytes: int
    basis_bytes: int
    graph_bytes: int
    graphs_kept: int
    num_batches: int
    num_parameters: int
    num_examples: int
    processes: int

    def __str__(self) -> str:
        mib = [f"{size / 2**20:,.0f} MiB" for size in (self.peak_bytes, self.basis_bytes, self.graph_bytes)]
        once, each = self.first_seconds, self.product_seconds
        shared = f" on {self.processes} processes" if self.processes > 1 else ""
        return (
            f"problem   {self.num_parameters:,} parameters, {self.num_examples:,} examples{shared}\n"
            f"products  at most {self.products}, {each:.3g} s each, the first {once:.3g} s\n"
            f"time      about {self.seconds:.3g} s\n"
            f"memory    {mib[0]} at the peak: Krylov basis {mib[1]}, gradient graphs {mib[2]}\n"
            f"graphs    {self.graphs_kept} of {self.num_batches} batches kept"
        )


def plan(risk: EmpiricalRisk, k: int = 5, *, options: SpectrumOptions | None = None) -> Plan:
    """What will `spectrum(risk, k)` cost?  Times two products: one that builds the graphs, one that uses them.

    Args:
        risk: Where.
        k: Eigenvalues at each end.
        options: The budgets that would be used.

    Returns:
        Plan; print it. Cost: two products.

    Raises:
        ValueError: k out of range.
    """
    require_risk(risk)
    options = options or SpectrumOptions()
    hessian = hessian_of(risk)
    rows = basis_rows(hessian, k, options)
    vector = rademacher((hessian.size,), make_generator(0))
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        (hessian @ vector).sum().item()  # .item() waits for a GPU
        seconds.append(time.perf_counter() - began)
    ranks, width = hessian.split.ranks, torch.promote_types(hessian.dtype, torch.float32).itemsize
    own_basis = rows * hessian.split.local_size * width
    kept_here, kept_bytes = (hessian.num_kept, hessian.kept_bytes) if isinstance(hessian, RiskOperator) else (0, 0)
    own = (*seconds, peak_bytes(hessian.device) + own_basis, own_basis, kept_bytes)
    first, later, peak, basis, graphs = (max(ranks.each(number)) for number in own)
    kept, batches = ranks.total(kept_here, risk.num_batches)
    products = options.expected_matvecs
    return Plan(
        products=products,
        seconds=first + (products - 1) * later,
        first_seconds=first,
        product_seconds=later,
        peak_bytes=int(peak),
        basis_bytes=int(basis),
        graph_bytes=int(graphs),
        graphs_kept=int(kept),
        num_batches=int(batches),
        num_parameters=hessian.size,
        num_examples=risk.num_examples,
        processes=ranks.count,
    )
