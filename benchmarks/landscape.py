"""What the landscape probes cost: a plane of losses, Fastfood products, a step of an elastic band.

    python benchmarks/landscape.py --output benchmarks/results/landscape.md
    python benchmarks/landscape.py --section plane --resolution 21 --rounds 1 --share 0.1

Each section is a function of its own module that returns the lines of its part; ratios are of times in the same run.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from landscape_band import band
from landscape_fastfood import fastfood
from landscape_plane import plane_section
from table import machine, publish

Section = Callable[[argparse.Namespace], list[str]]
SECTIONS: dict[str, tuple[str, Section]] = {
    "plane": ("A plane of losses", lambda args: plane_section(args.resolution, args.rounds, args.share)),
    "fastfood": ("Fastfood products", lambda args: fastfood(rounds=args.rounds)),
    "band": ("A step of an elastic band", lambda args: band(args.rounds)),
}


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--section", choices=SECTIONS, action="append", help="one of them, or several; default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--resolution", type=int, default=51, help="points a side of the plane")
    parser.add_argument("--share", type=float, default=1.0, help="of the plane's examples")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--output", type=Path, help="file to write the tables to, as well")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    lines = ["# The landscape probes", "", *machine(("losslab", "torch", "loss-landscapes"))]
    for name in args.section or SECTIONS:
        title, section = SECTIONS[name]
        lines += ["", f"## {title}", "", *section(args)]
    publish(lines, args.output)


if __name__ == "__main__":
    main()
