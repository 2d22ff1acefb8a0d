"""What goes into a run folder comes out again, and nothing half-written does."""

import json
import os
from dataclasses import dataclass

import numpy as np
import pytest

from losslab.records import from_record, to_record, write_atomically
from losslab.status import Status
from losslab.studies.record import RunFolder, run_folders


@dataclass(frozen=True)
class Inner:
    grid: np.ndarray
    width: float


@dataclass(frozen=True)
class Outer:
    top: np.ndarray
    density: Inner
    condition_number: float
    status: Status


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path / "study" / "run")


def test_create_refuses_what_is_there(folder):
    assert RunFolder.create(folder.path).path == folder.path  # still empty
    (folder.path / "notes.txt").write_text("mine")
    with pytest.raises(
        FileExistsError, match=r"not empty; choose another one, or pass --overwrite .*--resume to go on"
    ):
        RunFolder.create(folder.path)
    with pytest.raises(FileExistsError, match="a file is there"):
        RunFolder.create(folder.path / "notes.txt", overwrite=True)


def test_overwrite_deletes_what_a_run_wrote_and_nothing_else(folder):
    folder.write_config({"seed": 1})
    folder.log(1, {"loss": 1.0})
    folder.write_probe("spectrum", "1", {}, {})
    (folder.path / "notes.txt").write_text("mine")
    RunFolder.create(folder.path, overwrite=True)
    assert [path.name for path in folder.path.iterdir()] == ["notes.txt"]


def test_config_and_environment(folder):
    folder.write_config({"optimizer": {"lr": 5e-4}, "limit": float("inf")})
    folder.write_environment({"torch": "2"})
    assert folder.config == {"optimizer": {"lr": 5e-4}, "limit": "Infinity"}
    assert folder.environment == {"torch": "2"}


def test_metrics_round_trip_with_nonfinite_numbers(folder):
    assert folder.metrics() == []
    folder.log(3, {"kind": "epoch", "loss": float("nan"), "accuracy": np.float32(0.5)})
    folder.log(6, {"kind": "epoch", "loss": float("-inf")})
    first, second = folder.metrics()
    assert first["step"] == 3
    assert np.isnan(first["loss"])
    assert second == {"step": 6, "kind": "epoch", "loss": float("-inf")}


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', "\0\0\0", '{"step": 2}'])
def test_torn_last_line_is_left_out(folder, torn):
    folder.log(1, {"loss": 1.0})
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    assert folder.metrics() == [{"step": 1, "loss": 1.0}]


def test_broken_line_in_the_middle_is_an_error(folder):
    (folder.path / "metrics.jsonl").write_text('{"step": 1}\nbroken\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 2 is not JSON"):
        folder.metrics()


def test_probe_round_trip(folder):
    density = Inner(np.linspace(0, 1, 5), 0.1)
    result = Outer(np.array([3.0, np.inf]), density, float("inf"), Status.converged)
    folder.write_probe("spectrum", "690", *to_record(result))
    tree = folder.read_probe("spectrum", "690")
    np.testing.assert_array_equal(tree["top"], result.top)
    np.testing.assert_array_equal(tree["density"]["grid"], density.grid)
    assert (tree["density"]["width"], tree["condition_number"], tree["status"]) == (0.1, np.inf, "converged")
    again = from_record(Outer, *folder.read_record("spectrum", "690"))
    np.testing.assert_array_equal(again.density.grid, density.grid)
    assert again.status is Status.converged
    on_disk = json.loads((folder.path / "probes/spectrum/690.json").read_text())
    assert (on_disk["probe"], on_disk["label"], on_disk["values"]["condition_number"]) == (
        "spectrum",
        "690",
        "Infinity",
    )


def test_labels_are_in_numerical_order_and_the_latest_is_the_largest(folder):
    for label in ("90", "1000", "5"):
        folder.write_probe("noise", label, {"label": int(label)}, {})
    assert folder.probes() == {"noise": ["5", "90", "1000"]}
    assert folder.read_probe("noise")["label"] == 1000


def test_without_steps_the_latest_is_the_newest(tmp_path):
    study = RunFolder(tmp_path)
    for age, label in enumerate(["sgd--zero", "adamw--sgd"]):
        path = study.write_probe("interpolation", label, {"label": label}, {})
        os.utime(path, (1000 + age, 1000 + age))
    assert study.probes() == {"interpolation": ["adamw--sgd", "sgd--zero"]}
    assert study.read_probe("interpolation")["label"] == "adamw--sgd"


def test_missing_records_say_what_is_there(folder):
    with pytest.raises(FileNotFoundError, match=r"no record of the probe 'noise'; there: none"):
        folder.read_probe("noise")
    folder.write_probe("noise", "1", {}, {})
    with pytest.raises(FileNotFoundError, match="no record noise/2; there: 1"):
        folder.read_probe("noise", "2")


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden"])
def test_record_names_stay_in_their_folder(folder, name):
    with pytest.raises(ValueError, match="a record's name takes letters"):
        folder.write_probe("noise", name, {}, {})


def test_open_demands_a_run(folder):
    study = folder.path.parent
    with pytest.raises(FileNotFoundError, match=r"not a run folder: no config.json in it"):
        RunFolder.open(study)
    folder.write_config({})
    with pytest.raises(FileNotFoundError, match=r"it holds the runs run: name one of them"):
        RunFolder.open(study)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        RunFolder.open(study / "nothing")
    assert RunFolder.open(folder.path).config == {}


def test_run_folders_of_a_study(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run folder in it"):
        run_folders(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        run_folders(tmp_path / "nothing")
    for name in ("sgd", "adamw"):
        RunFolder.create(tmp_path / name).write_config({"name": name})
    RunFolder(tmp_path).write_probe("interpolation", "adamw--sgd", {}, {})
    (tmp_path / "report.html").write_text("")
    assert list(run_folders(tmp_path)) == ["adamw", "sgd"]
    assert run_folders(tmp_path)["sgd"].config == {"name": "sgd"}


def test_damaged_json_is_one_line(folder):
    (folder.path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: not readable as JSON"):
        _ = folder.config
    with pytest.raises(FileNotFoundError, match=r"environment.json: no such file"):
        _ = folder.environment


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
