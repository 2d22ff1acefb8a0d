"""How often does `losslab compare` state a factor between optimizers that are equal, in steps and in time?

    python benchmarks/false_verdicts.py --output benchmarks/results/false_verdicts.md

No networks: the steps to the target are log-normal, in multiples of the distance between two evaluations, and all that
follows is the comparison's own: pairs, intervals, tests, correction. A comparison is false if any pair has a factor.
Times: each run's steps at a price that scatters a little, the same for all optimizers.
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
PRICE = 0.02  # how a run's time for a step scatters, in its logarithm

Question = Callable[[list[Pairing]], bool]


def compared(rng: np.random.Generator, optimizers: int, seeds: int, faster: float) -> list[Pairing]:
    """The pairs of one comparison, of which the first optimizer is so much faster."""
    times = MEDIAN * rng.lognormal(0, SPREAD, (optimizers, seeds))
    times[0] /= faster
    steps = GRAIN * np.ceil(times / GRAIN)
    prices = rng.lognormal(0, PRICE, (optimizers, seeds))
    contenders = [
        Contender(name=str(number), steps=tuple(row), seconds=tuple(row * price), final=(0.0,) * seeds)
        for number, (row, price) in enumerate(zip(steps, prices, strict=True))
    ]
    return pairings(contenders, baseline="1")


def in_steps(pairs: list[Pairing]) -> bool:
    """Whether any two differ, as the comparison has it."""
    return any(pair.significant for pair in pairs)


def in_time(pairs: list[Pairing]) -> bool:
    """Whether any two differ in time."""
    return any(pair.significant_in_time for pair in pairs)


def by_interval(pairs: list[Pairing]) -> bool:
    """The same, if the interval alone decided."""
    return any(pair.seconds_ratio.excludes_one for pair in pairs)


def found(pairs: list[Pairing]) -> bool:
    """Whether the first, compared with the baseline, has a factor."""
    return pairs[0].significant and pairs[0].steps_ratio.value < 1


def rates(comparisons: int, optimizers: int, seeds: int, faster: float, *questions: Question) -> list[str]:
    """How often each holds, in per cent, with its standard error."""
    rng = np.random.default_rng([optimizers, seeds])
    made = [compared(rng, optimizers, seeds, faster) for _ in range(comparisons)]
    shares = [sum(map(holds, made)) / comparisons for holds in questions]
    return [f"{100 * share:.1f} ± {100 * math.sqrt(share * (1 - share) / comparisons):.1f} %" for share in shares]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=400, help="of each kind")
    parser.add_argument("--output", type=Path, help="file to write the page to, as well")
    args = parser.parse_args()
    rows = []
    for optimizers, seeds in SETTINGS:
        equal = rates(args.comparisons, optimizers, seeds, 1.0, in_steps, in_time, by_interval)
        unequal = rates(args.comparisons, optimizers, seeds, FASTER, found)
        cells = [str(math.comb(optimizers, 2)), *equal, *unequal]
        rows.append([f"{optimizers} optimizers, {seeds} seeds", *cells])
        print(rows[-1], flush=True)
    lines = ["# Factors between optimizers that are equal", "", *machine(("losslab", "numpy", "scipy"))]
    lines += [
        f"- {args.comparisons} comparisons of each kind; steps to the target log-normal with median {MEDIAN}, "
        f"{SPREAD} in their",
        f"  logarithm, in multiples of {GRAIN}; the time of a step scatters by {PRICE}; ± standard error",
        "",
    ]
    faster = f"one {FASTER} × faster than the baseline: a factor in steps"
    head = ["comparison", "pairs", "all equal: a factor in steps", "in time", "in time, if its interval alone decided"]
    head.append(faster)
    publish([*lines, *markdown(head, rows)], args.output)


if __name__ == "__main__":
    main()
