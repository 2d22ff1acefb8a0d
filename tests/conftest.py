"""Tests run side by side, one process a core: more threads in each only get in each other's way."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def load(monkeypatch):
    """Import a script or helper of the benchmarks by its name."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[1] / "benchmarks")])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return importlib.import_module
