"""What a spectrum would cost on machines that are not at hand: arithmetic, not measurement.

    python benchmarks/scaling_model.py --output benchmarks/results/scaling_model.md

The model has few constants, all named below with their origin; docs/scaling.md explains the formulas and compares them
with what was measured on small problems.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from table import markdown

VECTOR_BYTES = 4  # float32
FLOPS_OF_A_GRADIENT = 6  # for each parameter and token (Kaplan et al. 2020)
GPU_FLOPS = 0.4 * 989e12  # H100 SXM, bfloat16 without sparsity (data sheet), 40 % of it reached
GPU_BYTES = 80e9
GPU_BANDWIDTH = 0.8 * 3.35e12  # bytes a second to its memory (data sheet), 80 % of it reached
LINK = 0.8 * 50e9  # bytes a second for each GPU between machines (400 Gb/s), 80 % of it reached
DRAWS = 1.2e8  # random signs or normals a second on one host core (measured: AMD EPYC, torch 2.13)
NODES, SAMPLES = 100, 48  # products of a spectrum: `SpectrumOptions`


@dataclass(frozen=True)
class Setting:
    """A model, its data, and the processes that share them."""

    name: str
    parameters: float
    tokens: float
    ranks: int
    sharded: bool  # the model's own parameters too (FSDP), so that vectors stay in parts; products by differences

    @property
    def part(self) -> float:
        """Bytes of a vector that a process holds between products."""
        return VECTOR_BYTES * self.parameters / self.ranks

    @property
    def whole(self) -> float:
        return VECTOR_BYTES * self.parameters

    def memory(self) -> dict[str, float]:
        """Bytes a process: model, vectors of a product, basis (graphs and activations depend on the batch)."""
        model = self.part if self.sharded else self.whole
        vectors = 4 * (self.part if self.sharded else self.whole)  # θ, v, Av and the gradient
        return {"model": model, "vectors": vectors, "basis": NODES * self.part}

    def seconds(self) -> dict[str, float]:
        """Of each product: compute, communication, orthogonalisation (mean over the run); and of drawing a vector."""
        gradients = 2.0 if self.sharded else 1.6
        compute = gradients * FLOPS_OF_A_GRADIENT * self.parameters * self.tokens / self.ranks / GPU_FLOPS
        share = (self.ranks - 1) / self.ranks
        # Sharded: two gradients, each gathers the weights twice and scatters the gradient once, in bfloat16. Else one
        # all-reduce of the product (twice the vector) and one gathering of the next vector.
        moved = share * (2 * 3 * 2 * self.parameters if self.sharded else 3 * self.whole)
        passes = 16 * NODES / 2 * self.part / VECTOR_BYTES  # bytes: two passes of block Gram-Schmidt at half the rows
        return {
            "compute": compute,
            "communication": moved / LINK,
            "orthogonalisation": passes / GPU_BANDWIDTH,
            "drawing": self.parameters / DRAWS,
        }


SETTINGS = [
    Setting("GPT-2 small, 124 M", 124e6, 1e6, 1, False),
    Setting("GPT-2 small, 124 M", 124e6, 1e6, 8, False),
    Setting("1.3 B", 1.3e9, 1e6, 8, False),
    Setting("7 B", 7e9, 1e6, 64, False),
    Setting("7 B", 7e9, 1e6, 64, True),
    Setting("70 B", 70e9, 1e6, 1024, False),
    Setting("70 B", 70e9, 1e6, 1024, True),
]


def row(setting: Setting) -> list[str]:
    memory, seconds = setting.memory(), setting.seconds()
    each = seconds["compute"] + seconds["communication"] + seconds["orthogonalisation"]
    total = (NODES + SAMPLES) * (each + seconds["drawing"] * SAMPLES / (NODES + SAMPLES))
    fits = sum(memory.values()) <= GPU_BYTES
    worst = max(memory, key=memory.__getitem__)
    return [
        f"{setting.name}{', FSDP' if setting.sharded else ''}",
        str(setting.ranks),
        *(f"{memory[key] / 1e9:.2f}" for key in ("model", "vectors", "basis")),
        *(f"{seconds[key]:.3g}" for key in ("compute", "communication", "orthogonalisation", "drawing")),
        f"{total / 60:.3g} min" if fits else "–",
        "yes" if fits else f"no: {worst}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="file to write the table to, as well")
    args = parser.parse_args()
    header = ["model, on one million tokens", "GPUs", "model GB", "vectors GB", "basis GB"]
    header += ["compute s", "communication s", "orthogonalisation s", "drawing s", "a spectrum", "fits 80 GB"]
    lines = ["# What a spectrum would cost elsewhere (computed, not measured)", ""]
    lines += ["- seconds: of one product, on the busiest process; drawing: of one random vector, on the host"]
    lines += [f"- a spectrum: {NODES} products of the shared run and {SAMPLES} samples of the trace, each drawn", ""]
    lines += markdown(header, map(row, SETTINGS))
    print("\n".join(lines))
    if args.output:
        args.output.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
