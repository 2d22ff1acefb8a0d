"""The founding study's output files, under its names, made from losslab's records beside them.

| file in `<run>/probes/` | what it holds |
| --- | --- |
| lanczos_spectrum_checkpoint.json | both ends of the spectrum, condition number |
| sgd_noise_checkpoint_seed42.json | both top eigenvalues, their ratio |
| meta_checkpoint_seed42.json, eps_list_….npy, losses_….npy | the loss along the top eigenvector |
| subspace_d15_seed42.safetensors | the coordinates found in the subspace (a pickle there; none here) |
| interp_data.npz, interp_A_to_B.png | the straight line to the next solution |

and in `<run>/auto_neb/` neb_meta_A_to_B.json and node_00_A_to_B.npy … for the elastic band. A and B are the runs' names
(there they were both "checkpoint"), 42 is the run's seed. The picture is made with the study's report.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from losslab.studies.record import RunFolder, write_atomically, write_json


def write_solution(folder: RunFolder, seed: int) -> None:
    """The files of one solution, for the records that are there."""
    out, found = folder.path / "probes", folder.probes()
    if "spectrum" in found:
        write_json(out / "lanczos_spectrum_checkpoint.json", _spectrum(folder.read_probe("spectrum")))
    if "noise" in found:
        write_json(out / f"sgd_noise_checkpoint_seed{seed}.json", _noise(folder.read_probe("noise")))
    if "perturbation" in found:
        record = folder.read_probe("perturbation")
        write_json(out / f"meta_checkpoint_seed{seed}.json", _perturbation(record))
        _write_array(out / f"eps_list_checkpoint_seed{seed}.npy", record["epsilons"])
        _write_array(out / f"losses_checkpoint_seed{seed}.npy", record["losses"][0])
    if "intrinsic_dimension" in found:
        record = folder.read_probe("intrinsic_dimension")
        coordinates = record["coordinates"]
        content = safetensors.numpy.save({"coordinates": coordinates, "score": np.array(record["score"])})
        write_atomically(out / f"subspace_d{coordinates.shape[-1]}_seed{seed}.safetensors", content)


def write_pair(study: RunFolder, folder: RunFolder, first: str, second: str) -> None:
    """The files of what lies between two solutions, into the first one's folder."""
    label, found, name = f"{first}--{second}", study.probes(), f"{first}_to_{second}"
    if label in found.get("interpolation", []):
        record = study.read_probe("interpolation", label)
        buffer = io.BytesIO()
        np.savez(buffer, alphas=record["alphas"], losses=record["losses"])
        write_atomically(folder.path / "probes" / "interp_data.npz", buffer.getvalue())
    if label in found.get("elastic_band", []):
        record, out = study.read_probe("elastic_band", label), folder.path / "auto_neb"
        out.mkdir(exist_ok=True)
        write_json(out / f"neb_meta_{name}.json", _band(record, label))
        for number, node in enumerate(record["pivots"]):
            _write_array(out / f"node_{number:02}_{name}.npy", node)


def _spectrum(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "top_eigenvalues": record["top"].tolist(),
        "top_errors": record["top_errors"].tolist(),
        "smallest_eigenvalues": record["smallest"].tolist(),
        "smallest_errors": record["smallest_errors"].tolist(),
        "condition_number": record["condition_number"],
        "matvecs": record["matvecs"],
        "status": record["status"],
    }


def _noise(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "hessian_top_eigenvalue": record["hessian_top"],
        "covariance_top_eigenvalue": record["covariance_top"],
        "noise_ratio": record["ratio"],
        "status": record["status"],
    }


def _perturbation(record: dict[str, Any]) -> dict[str, Any]:
    """Of the top eigenvector, the first direction."""
    return {
        "direction": record["directions"][0],
        "eigenvalue": float(record["curvatures"][0]),
        "eigenvalue_error": float(record["curvature_errors"][0]),
        "fitted_curvature": float(record["fitted"][0]),
        "fitted_error": float(record["fitted_errors"][0]),
        "quadratic_up_to": float(record["valid_to"][0]),
        "loss": record["loss"],
        "status": record["status"],
    }


def _band(record: dict[str, Any], label: str) -> dict[str, Any]:
    return {
        "path": label,
        "path_loss": record["path_loss"],
        "saddle": record["saddle"],
        "barrier": record["barrier"],
        "node_losses": record["pivot_losses"].tolist(),
        "status": record["status"],
    }


def _write_array(path: Path, values: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    write_atomically(path, buffer.getvalue())
