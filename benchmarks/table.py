"""Markdown tables that say on which machine, and with which versions, they were made."""

import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from losslab.studies.environment import environment


def machine(packages: Iterable[str]) -> list[str]:
    """Machine, system, versions and date, as the lines of a list."""
    here = environment(seed=0, device=torch.device("cpu"))
    gib = psutil.virtual_memory().total / 2**30
    load = f", load average {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    return [
        f"- machine: {here['processor']}, {here['cpu_count']} cores, {here['threads']} threads, {gib:.0f} GiB{load}",
        f"- system: {system()}, Python {here['python']}",
        f"- packages: {', '.join(f'{name} {installed(name)}' for name in packages)}",
        f"- date: {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, losslab at commit {here['git_commit']}",
    ]


def system() -> str:
    """The operating system and its C library, whose allocator matters here."""
    release = ".".join(platform.release().split(".")[:2])
    return f"{platform.system()} {release} {platform.machine()} {' '.join(platform.libc_ver())}".strip()


def installed(package: str) -> str:
    """A package's version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def spread(values: Sequence[float], form: str) -> str:
    """Median (smallest–largest), or the value alone where all look the same."""
    low, middle, high = (format(f(values), form) for f in (min, statistics.median, max))
    return middle if low == high else f"{middle} ({low}–{high})"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table; all columns but the first are aligned right."""
    rule = [":--"] + ["--:"] * (len(header) - 1)
    return ["| " + " | ".join(row) + " |" for row in (header, rule, *rows)]


def publish(lines: Iterable[str], output: Path | None) -> None:
    """Print the lines, and write them to a file if one is given."""
    text = "\n".join([*lines, ""])
    print(text)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
