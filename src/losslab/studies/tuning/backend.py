"""Optuna: sampler, pruners, journal. Optional, and imported here only, when a study is made: it takes half a second."""

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from warnings import catch_warnings, simplefilter

from losslab.studies.optional import optional
from losslab.studies.spaces import Choice, Range


def optuna() -> types.ModuleType:
    """The package, silent: what it would log is in the study's record.

    Raises:
        ValueError: It is not installed.
    """
    package = optional("optuna", "losslab[tune]")
    package.logging.set_verbosity(package.logging.ERROR)
    return package


@contextmanager
def quietly() -> Iterator[None]:
    """Without Optuna's warnings about options that it calls experimental, such as the multivariate sampler."""
    with catch_warnings():
        simplefilter("ignore")
        yield


def distribution(entry: Range | Choice) -> Any:
    """Optuna's form of what a parameter may be; choices stand for their places in the list."""
    distributions = optuna().distributions
    if isinstance(entry, Choice):
        return distributions.CategoricalDistribution(tuple(range(len(entry.values))))
    whole = isinstance(entry.low, int) and isinstance(entry.high, int)
    kind = distributions.IntDistribution if whole else distributions.FloatDistribution
    return kind(entry.low, entry.high, log=entry.log)


def coded(entry: Range | Choice, value: Any) -> Any:
    """A value as Optuna holds it."""
    return entry.values.index(value) if isinstance(entry, Choice) else value


def decoded(entry: Range | Choice, value: Any) -> Any:
    """The value that Optuna's stands for."""
    return entry.values[value] if isinstance(entry, Choice) else value
