"""Small synthetic folders in the run folder's format, for the tests of the report."""

from pathlib import Path

import numpy as np

from losslab.studies.record import RunFolder

NAMES = ("adamw", "sgd", "sgd-momentum")
STEP = "690"


def write_study(path: Path) -> Path:
    """A study as `losslab demo` leaves it: three runs, three interpolations."""
    for index, name in enumerate(NAMES):
        write_run(path / name, seed=index)
    study = RunFolder(path)
    for first, second in (("adamw", "sgd"), ("adamw", "sgd-momentum"), ("sgd", "sgd-momentum")):
        study.write_probe(
            "interpolation", f"{first}--{second}", *interpolation(NAMES.index(first), NAMES.index(second))
        )
    return path


def write_run(path: Path, seed: int = 0) -> RunFolder:
    """A finished run with every probe."""
    folder = start_run(path, seed)
    for epoch in range(1, 21):
        folder.log(23 * epoch, epoch_row(epoch, seed))
    folder.log(460, {"kind": "final", "test_loss": 0.1 + 0.01 * seed, "test_accuracy": 0.985 - 0.01 * seed})
    for name, make in (("spectrum", spectrum), ("sharpness", sharpness), ("plane", plane), ("noise", noise)):
        folder.write_probe(name, STEP, *make(seed))
    return folder


def start_run(path: Path, seed: int = 0) -> RunFolder:
    """A run that was interrupted before its first epoch."""
    folder = RunFolder.create(path)
    optimizer = {
        "name": "sgd",
        "lr": 0.1,
        "momentum": 0.9 * (seed == 2),
        "weight_decay": 0.0,
        "betas": [0.9, 0.999],
    }
    folder.write_config({"name": path.name, "seed": seed, "optimizer": optimizer, "model": {"name": "simple_cnn"}})
    versions = {"losslab": "0.1.0", "python": "3.11.2", "torch": "2.13.0", "git_commit": None}
    folder.write_environment(versions | {"seed": seed, "threads": 2, "started": f"2025-11-22T08:0{seed}:00+00:00"})
    return folder


def epoch_row(epoch: int, seed: int = 0) -> dict:
    loss = 2.3 * np.exp(-0.3 * epoch) + 0.002 * (seed + 1)
    return {
        "kind": "epoch",
        "epoch": epoch,
        "seconds": 1.5 * epoch,
        "learning_rate": 0.1,
        "train_loss": loss,
        "train_accuracy": 1 - 0.4 * loss / 2.3,
        "validation_loss": loss + 0.08,
        "validation_accuracy": 0.97 - 0.4 * loss / 2.3,
    }


def spectrum(seed: int = 0, status: str = "converged"):
    top = (seed + 1) * np.array([13.0, 9.5, 6.25, 4.0, 2.5])
    grid = np.linspace(-1.0, 1.15 * top[0], 400)
    bulk = 20 * np.exp(-0.5 * ((grid - 0.05) / 0.25) ** 2)
    bumps = sum(2e-4 * np.exp(-0.5 * ((grid - value) / 0.25) ** 2) for value in top)
    values = {
        "trace": {
            "value": 51.25 + seed,
            "standard_error": 1.5,
            "num_samples": 12,
            "matvecs": 48,
            "status": "converged",
            "seed": 0,
        },
        "density": {"width": 0.25, "num_probes": 4, "matvecs": 240, "status": "converged"},
        "condition_number": 43.5 * (seed + 1),
        "spectral_gap": float(top[0] - top[1]),
        "num_negative": 2,
        "negative_mass": 0.31,
        "num_parameters": 92938,
        "num_examples": 512,
        "matvecs": 148,
        "status": status,
        "seed": 0,
    }
    arrays = {
        "top": top,
        "top_errors": np.array([1e-5, 1e-4, 1e-3, 0.01, 0.3]),
        "smallest": np.array([-0.31, -0.22, -0.1, 0.001, 0.002]) * (seed + 1),
        "smallest_errors": np.full(5, 0.01),
        "density.grid": grid,
        "density.density": bulk + bumps + 1e-14,
        "density.standard_error": 0.25 * (bulk + bumps) + 1e-6,
    }
    return values, arrays


def sharpness(seed: int = 0):
    increases = (seed + 1) * np.random.default_rng(seed).gamma(3.0, 0.01, 20)
    values = {
        "value": float(increases.max()),
        "radius": 0.5,
        "relative_radius": 0.05,
        "num_samples": 20,
        "loss": 0.01,
    }
    return values | {"status": "converged", "seed": 0}, {"increases": increases}


def plane(seed: int = 0):
    axis = np.linspace(-1, 1, 21)
    alphas, betas = np.meshgrid(axis, axis)
    losses = 0.004 + (seed + 1) * (3 * alphas**2 + betas**2) + 0.3 * np.sin(3 * alphas) ** 2 * betas**2
    values = {"loss": 0.004, "normalization": "filter", "distance": 1.0, "status": "converged", "seed": 0}
    return values, {"alphas": axis, "betas": axis, "losses": losses}


def noise(seed: int = 0):
    values = {
        "covariance_top": 8.0 + seed,
        "covariance_error": 0.4,
        "hessian_top": 13.0 * (seed + 1),
        "hessian_error": 1e-5,
    }
    values |= {"ratio": (8.0 + seed) / (13.0 * (seed + 1)), "ratio_error": 0.03}
    values |= {"covariance_trace": 40.0, "num_examples": 512}
    return values | {"matvecs": 60, "status": "converged", "seed": 0}, {}


def interpolation(first: int = 0, second: int = 1):
    alphas = np.linspace(-0.5, 1.5, 41)
    losses = 0.004 + (1 + first + second) * np.sin(np.pi * alphas) ** 2 * (1 + (alphas - 0.5) ** 2)
    values = {
        "barrier": float(losses[10:31].max() - 0.004),
        "loss_a": 0.004,
        "loss_b": 0.004,
        "distance": 14.2,
    }
    return values | {"best_alpha": 0.0, "status": "converged"}, {"alphas": alphas, "losses": losses}
