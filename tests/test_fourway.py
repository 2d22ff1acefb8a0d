"""Whole studies: the founding study's files beside losslab's records, what is there is kept; one network analysed."""

import json

import numpy as np
import pytest
import safetensors.numpy
from typer.testing import CliRunner

from losslab import cli
from losslab.studies.analysis import Analysis, analyze
from losslab.studies.fourway import FourWay, fourway
from losslab.studies.record import RunFolder
from losslab.studies.sections import RunConfig

TINY = {
    "seed": 42,
    "model": {"name": "mlp", "width": 4, "hidden": 1},
    "dataset": {"train_examples": 64},
    "training": {"epochs": 1, "device": "cpu"},
    "probes": {"examples": 16, "batch_size": 16},
}
QUICK = FourWay(
    solutions={
        "spectrum": {"k": 3, "num_nodes": 12, "trace_samples": 4},
        "noise": {"tol": 0.1},
        "perturbation": {"resolution": 5, "k": 1, "num_random": 1},
        "intrinsic_dimension": {"dimension": 3, "num_seeds": 1, "steps": 3},
    },
    pairs={"interpolation": {"steps": 5}, "elastic_band": {"num_nodes": 3, "steps": 2}},
)


def configs(*rates: float) -> list[RunConfig]:
    settings = [TINY | {"name": f"run{i}", "optimizer": {"lr": rate}} for i, rate in enumerate(rates)]
    return [RunConfig.model_validate(values) for values in settings]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return fourway(tmp_path_factory.mktemp("studies") / "four", configs(0.1, 0.2, 0.3), QUICK)


def read(path):
    return json.loads(path.read_text())


def test_the_founding_files_say_what_the_records_say(study):
    probes, folder = study / "run0" / "probes", RunFolder(study / "run0")
    spectrum = folder.read_probe("spectrum")
    written = read(probes / "lanczos_spectrum_checkpoint.json")
    np.testing.assert_array_equal(written["top_eigenvalues"], spectrum["top"])
    assert len(written["top_eigenvalues"]) == 3
    assert written["condition_number"] == abs(spectrum["top"][0] / spectrum["smallest"][0])
    noise = folder.read_probe("noise")
    assert read(probes / "sgd_noise_checkpoint_seed42.json")["noise_ratio"] == noise["ratio"]
    perturbation = folder.read_probe("perturbation")
    np.testing.assert_array_equal(np.load(probes / "eps_list_checkpoint_seed42.npy"), perturbation["epsilons"])
    np.testing.assert_array_equal(np.load(probes / "losses_checkpoint_seed42.npy"), perturbation["losses"][0])
    meta = read(probes / "meta_checkpoint_seed42.json")
    assert meta["eigenvalue"] == pytest.approx(spectrum["top"][0], rel=1e-2)
    subspace = safetensors.numpy.load_file(probes / "subspace_d3_seed42.safetensors")
    assert subspace["coordinates"].shape == (1, 3)


def test_each_solution_is_connected_to_the_next(study):
    for first, second in (("run0", "run1"), ("run1", "run2"), ("run2", "run0")):
        record = RunFolder(study).read_probe("elastic_band", f"{first}--{second}")
        band = study / first / "auto_neb"
        assert read(band / f"neb_meta_{first}_to_{second}.json")["path_loss"] == record["path_loss"]
        nodes = [np.load(path) for path in sorted(band.glob("node_*.npy"))]
        np.testing.assert_array_equal(nodes, record["pivots"])
        line = RunFolder(study).read_probe("interpolation", f"{first}--{second}")
        with np.load(study / first / "probes" / "interp_data.npz") as written:
            np.testing.assert_array_equal(written["losses"], line["losses"])
            assert len(written["alphas"]) == 5


def test_what_is_there_is_kept(study):
    notes = []
    before = {path: path.stat().st_mtime_ns for path in study.rglob("probes/*/*")}
    before |= {path: path.stat().st_mtime_ns for path in study.rglob("checkpoints/*")}
    fourway(study, configs(0.1, 0.2, 0.3), QUICK, progress=lambda done, total, note: notes.append((done, total)))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert notes[-1] == (20, 21)  # 3 trainings, 3 × 4 probes, 3 × 2 between


def test_another_configuration_is_not_written_over(study):
    with pytest.raises(ValueError, match="holds a run of another configuration"):
        fourway(study, configs(0.5), QUICK)
    same = configs(0.1)[0]
    with pytest.raises(ValueError, match="expected different names, got run0, run0"):
        fourway(study, [same, same], QUICK)


def test_analysis_measures_what_was_asked_for(tmp_path):
    (config,) = configs(0.1)
    settings = {"sharpness": {"num_samples": 2}, "spectrum": {"k": 2, "trace_samples": 4}, "plane": {"resolution": 3}}
    asked = Analysis(hessian=True, visualize=True, trajectory=True, settings=settings)
    found = analyze(config, tmp_path / "run", asked)
    assert list(found) == ["sharpness", "spectrum", "plane", "trajectory"]
    assert set(RunFolder(tmp_path / "run").probes()) == set(found)
    assert len(found["trajectory"].steps) >= 2
    again = analyze(config, tmp_path / "run", asked)
    assert again["spectrum"].top.tolist() == found["spectrum"].top.tolist()


def test_analyze_command(tmp_path):
    arguments = ["analyze", "--model", "mlp", "--dataset", "digits", "--save-dir", str(tmp_path), "--config", "sgd"]
    arguments += ["--compute-hessian", "--visualize", "--track-trajectory", "--quiet"]
    changes = ("model.width=3", "training.epochs=1", "dataset.train_examples=64", "schedule.warmup_steps=0")
    for change in (*changes, "probes.examples=16"):
        arguments += ["--set", change]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "condition number" in result.output
    assert "Dinh et al. 2017" in result.output
    run = tmp_path / "mlp-digits"
    assert set(RunFolder(run).probes()) == {"sharpness", "spectrum", "plane", "trajectory"}
    assert (run / "report.html").is_file()


def test_fourway_command_goes_on_and_draws_the_lines(study, tmp_path):
    files = []
    for config in configs(0.1, 0.2, 0.3):
        files.append(str(tmp_path / f"{config.name}.json"))
        (tmp_path / f"{config.name}.json").write_text(json.dumps(config.model_dump(mode="json")))
    result = CliRunner().invoke(cli.app, ["study", "fourway", *files, "--output", str(study), "--quiet"])
    assert result.exit_code == 0, result.output
    assert "barrier run0 → run1" in result.output
    for first, second in (("run0", "run1"), ("run1", "run2"), ("run2", "run0")):
        picture = study / first / "probes" / f"interp_{first}_to_{second}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert (study / "report.html").is_file()
