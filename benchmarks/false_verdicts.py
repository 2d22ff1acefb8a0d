"""How often does `losslab compare` state a factor between optimizers that are equal?  And between unequal ones?

    python benchmarks/false_verdicts.py --output benchmarks/results/false_verdicts.md

No networks: the steps to the target are log-normal, in multiples of the distance between two evaluations, and all that
follows is the comparison's own: pairs, intervals, tests, correction. A comparison is false if any pair has a factor.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from table import machine, markdown, publish

from losslab.studies.compare.measured import pairings
from losslab.studies.compare.result import Contender, Pairing

SETTINGS = ((2, 5), (2, 6), (3, 5), (3, 7), (4, 5), (4, 8))  # optimizers, seeds
MEDIAN, SPREAD, GRAIN = (
    300,
    0.3,
    17,
)  # steps to the target; of their logarithm; between two evaluations, as in configs/compare
FASTER = 1.5


def compared(rng: np.random.Generator, optimizers: int, seeds: int, faster: float) -> list[Pairing]:
    """The pairs of one comparison, of which the first optimizer is so much faster."""
    times = MEDIAN * rng.lognormal(0, SPREAD, (optimizers, seeds))
    times[0] /= faster
    steps = GRAIN * np.ceil(times / GRAIN)
    unknown = (math.nan,) * seeds
    contenders = [
        Contender(name=str(number), steps=tuple(row), seconds=unknown, final=(0.0,) * seeds)
        for number, row in enumerate(steps)
    ]
    return pairings(contenders, baseline="1")


def false(pairs: list[Pairing]) -> bool:
    """Whether any two differ, as the comparison has it."""
    return any(pair.significant for pair in pairs)


def found(pairs: list[Pairing]) -> bool:
    """Whether the first, compared with the baseline, has a factor."""
    return pairs[0].significant and pairs[0].steps_ratio.value < 1


def rate(comparisons: int, optimizers: int, seeds: int, faster: float, holds: Callable[[list[Pairing]], bool]) -> str:
    """In per cent, with its standard error."""
    rng = np.random.default_rng([optimizers, seeds])
    share = sum(holds(compared(rng, optimizers, seeds, faster)) for _ in range(comparisons)) / comparisons
    return f"{100 * share:.1f} ± {100 * math.sqrt(share * (1 - share) / comparisons):.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=400, help="of each kind")
    parser.add_argument("--output", type=Path, help="file to write the page to, as well")
    args = parser.parse_args()
    rows = []
    for optimizers, seeds in SETTINGS:
        rates = [rate(args.comparisons, optimizers, seeds, *kind) for kind in ((1.0, false), (FASTER, found))]
        rows.append([f"{optimizers} optimizers, {seeds} seeds", str(math.comb(optimizers, 2)), *rates])
        print(rows[-1], flush=True)
    lines = ["# Factors between optimizers that are equal", "", *machine(("losslab", "numpy", "scipy"))]
    lines += [
        f"- {args.comparisons} comparisons of each kind; steps to the target log-normal with median {MEDIAN}, "
        f"{SPREAD} in their",
        f"  logarithm, in multiples of {GRAIN}; ± standard error",
        "",
    ]
    faster = f"a factor where one is {FASTER} × faster than the baseline"
    head = ["comparison", "pairs", "a factor somewhere, all equal", faster]
    publish([*lines, *markdown(head, rows)], args.output)


if __name__ == "__main__":
    main()
