"""What TensorBoard gets of a run, and that `losslab board` shows it."""

import contextlib
import importlib
import io
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import nn
from typer.testing import CliRunner

from losslab import cli
from losslab.studies.board import Logdir, serve
from losslab.studies.monitor import gradient_norm, histograms, parameter_norm
from losslab.studies.record import ModelSink, RunFolder
from losslab.studies.tensorboard import FOLDER, TensorBoard
from untouched import assert_untouched

CONFIG = {"name": "a", "optimizer": {"lr": 0.1, "betas": [0.9, 0.99]}, "training": {"target": None, "ema": True}}


def row(step: int, **values) -> dict:
    return {"kind": "epoch", "epoch": step, "train_loss": 1 / step, "learning_rate": 0.1, **values}


def read(path) -> EventAccumulator:
    return EventAccumulator(str(path), size_guidance={"histograms": 0}).Reload()


def points(path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, pytest.approx(event.value)) for event in read(path).Scalars(tag)]


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout(0.5), nn.Linear(2, 2))


def test_every_number_is_a_point_of_a_curve(tmp_path):
    sink = TensorBoard(tmp_path, CONFIG)
    assert isinstance(sink, ModelSink)
    assert not isinstance(RunFolder(tmp_path), ModelSink)  # a sink that only takes rows
    for step in (2, 4):
        sink.log(step, row(step, validation_accuracy=0.5, gradient_norm=3.0, of_mine=7, note="text", flag=True))
    sink.log(4, {"kind": "final", "status": "completed", "test_loss": math.nan})
    assert points(tmp_path, "loss/train") == [(2, 0.5), (4, 0.25)]
    assert points(tmp_path, "training/learning_rate") == [(2, 0.1), (4, 0.1)]
    assert points(tmp_path, "norm/gradient") == [(2, 3), (4, 3)]
    assert points(tmp_path, "of_mine") == [(2, 7), (4, 7)]
    assert math.isnan(read(tmp_path).Scalars("loss/test")[0].value)
    tags = {"loss/train", "loss/test", "accuracy/validation", "training/learning_rate", "training/epoch"}
    assert set(read(tmp_path).Tags()["scalars"]) == tags | {"norm/gradient", "of_mine"}


def test_norms_are_those_of_all_trained_parameters_together(network):
    assert math.isnan(gradient_norm(network))
    network(torch.ones(4, 3)).square().sum().backward()
    network[0].bias.requires_grad_(False)
    weights = torch.cat([p.detach().flatten() for p in network.parameters() if p.requires_grad])
    gradient = torch.cat([p.grad.flatten() for p in network.parameters() if p.requires_grad])
    assert parameter_norm(network) == pytest.approx(weights.norm().item())
    assert gradient_norm(network) == pytest.approx(gradient.norm().item())


def test_the_graph_is_drawn_and_the_network_left_as_it_was(network, tmp_path):
    sink = TensorBoard(tmp_path, CONFIG)
    with assert_untouched(network):
        sink.open(network, torch.ones(4, 3), 0)
    sink.close()
    assert any("Linear[3]" in node.name for node in read(tmp_path).Graph().node)


class Untraceable(nn.Module):
    def forward(self, inputs):
        raise RuntimeError("no graph of mine\nand more")


def test_a_network_that_cannot_be_traced_is_trained_all_the_same(tmp_path, capsys):
    sink = TensorBoard(tmp_path, CONFIG)
    sink.open(Untraceable(), torch.ones(1), 0)
    sink.log(1, row(1))
    assert points(tmp_path, "loss/train") == [(1, 1)]
    (note,) = read(tmp_path).Tensors("graph/text_summary")
    assert b"no graph of mine" in note.tensor_proto.string_val[0]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("wanted", [True, False])
def test_histograms_on_request(wanted, network, tmp_path):
    network[0].weight.data[0, 0] = math.nan
    network[3].bias.data.fill_(math.inf)
    network(torch.ones(4, 3)).sum().backward()
    sink = TensorBoard(tmp_path, CONFIG, with_histograms=wanted)
    sink.open(network, torch.ones(4, 3), 0)
    sink.log(5, row(5))
    sink.log(5, {"kind": "final"})
    found = read(tmp_path)
    tags = found.Tags()["histograms"]
    assert bool(tags) is wanted
    if wanted:
        assert set(tags) == {tag for tag, _ in histograms(network)}
        (at,) = found.Histograms("weights/0.weight")  # once a row of an epoch
        assert (at.step, at.histogram_value.num) == (5, 5)  # of six values one is none
        assert "weights/3.bias" not in tags


def test_settings_stand_beside_results(tmp_path):
    sink = TensorBoard(tmp_path, CONFIG)
    sink.log(1, row(1, validation_loss=2.0))
    sink.log(1, {"kind": "final", "test_accuracy": 0.75})
    content = read(tmp_path).PluginTagToContent("hparams")
    start = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info.hparams
    assert {key: value.string_value or value.number_value for key, value in start.items()} == {
        "name": "a", "optimizer.lr": 0.1, "optimizer.betas": "0.9, 0.99", "training.ema": 1
    }  # fmt: skip
    experiment = HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment
    assert {info.name.tag for info in experiment.metric_infos} == {"loss/train", "loss/validation", "accuracy/test"}


def test_a_run_that_goes_on_has_no_point_twice(network, tmp_path):
    killed = TensorBoard(tmp_path, CONFIG)
    killed.open(network, torch.ones(4, 3), 0)
    for step in (1, 2, 3):
        killed.log(step, row(step))
    again = TensorBoard(tmp_path, CONFIG)  # from the checkpoint of step 1
    again.open(network, torch.ones(4, 3), 1)
    for step in (2, 3, 4):
        again.log(step, row(step, train_loss=-step))
    assert points(tmp_path, "loss/train") == [(1, 1), (2, -2), (3, -3), (4, -4)]


def test_without_the_package_one_line_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    real = importlib.import_module

    def missing(name, *rest):
        if "tensorboard" in name:
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr("losslab.studies.tensorboard.importlib.import_module", missing)
    for command in (["train", "sgd", "--board", "--output", str(tmp_path / "run")], ["board", str(tmp_path)]):
        monkeypatch.setattr(sys, "argv", ["losslab", *command])
        with pytest.raises(SystemExit):
            cli.main()
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "pip install 'losslab[board]'" in line
    assert not (tmp_path / "run").exists()


def make_run(path, steps: int) -> RunFolder:
    folder = RunFolder.create(path)
    folder.write_config(CONFIG)
    folder.write_environment({})
    for step in range(1, steps + 1):
        folder.log(step, row(step))
    return folder


def test_runs_at_any_depth_are_shown_also_those_without_files_of_their_own(tmp_path):
    make_run(tmp_path / "study" / "plain", 1)
    own = make_run(tmp_path / "study" / "deep" / "own", 1)
    TensorBoard(own.path / FOLDER, CONFIG).log(9, row(9))
    (tmp_path / "study" / "model").mkdir()
    (tmp_path / "study" / "model" / "config.json").write_text("{}")  # another program's
    logdir = Logdir(tmp_path / "study", tmp_path / "out")
    logdir.refresh()
    assert set(logdir.runs()) == {"plain", "deep/own"}
    assert points(tmp_path / "out" / "plain", "loss/train") == [(1, 1)]
    assert points(tmp_path / "out" / "deep" / "own", "loss/train") == [(9, pytest.approx(1 / 9))]


def test_a_run_at_work_is_followed_also_back_to_its_checkpoint(tmp_path):
    run = make_run(tmp_path / "study", 2)
    logdir = Logdir(tmp_path / "study", tmp_path / "out")
    logdir.refresh()
    run.log(4, row(4))
    logdir.refresh()
    logdir.refresh()
    shown = tmp_path / "out" / "study"  # a run alone has its folder's name
    assert points(shown, "loss/train") == [(1, 1), (2, 0.5), (4, 0.25)]
    rows = (run.path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run.path / "metrics.jsonl").write_text(rows[0])
    run.log(3, row(3))
    logdir.refresh()
    assert points(shown, "loss/train") == [(1, 1), (3, pytest.approx(1 / 3))]


@contextlib.contextmanager
def taken_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_bad_input_of_the_board(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        serve(tmp_path / "nowhere", 0, "127.0.0.1", print)
    with pytest.raises(FileNotFoundError, match="no run folder in it"):
        serve(tmp_path, 0, "127.0.0.1", print)
    make_run(tmp_path / "run", 1)
    with taken_port() as port, contextlib.redirect_stderr(io.StringIO()), pytest.raises(ValueError, match=str(port)):
        serve(tmp_path, port, "127.0.0.1", print)


def answer(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=30) as response:
        return response.read()


# What a shell has started in the background ignores Ctrl-C, and its children do too unless they say otherwise.
HEEDING = (
    "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "runpy.run_module('losslab', run_name='__main__')"
)


def test_it_answers_over_http_on_this_machine_and_ends_at_ctrl_c(tmp_path):
    make_run(tmp_path / "runs" / "a", 2)
    command = [sys.executable, "-c", HEEDING, "board", str(tmp_path / "runs"), "--port", "0"]
    aside = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=aside) as program:
        url = program.stdout.readline().split()[0]
        assert url.startswith("http://127.0.0.1:")
        assert list(tmp_path.glob("losslab-board-*"))
        assert b"TensorBoard" in answer(url)
        while (runs := json.loads(answer(f"{url}data/runs"))) != ["a"]:  # it reads them by and by
            assert runs == []
            time.sleep(0.1)
        program.send_signal(signal.SIGINT)
        said = program.communicate(timeout=60)
    assert program.returncode == 130, said
    assert not list(tmp_path.glob("losslab-board-*"))


def test_train_with_board_leaves_files_that_a_new_run_replaces(tmp_path):
    path, small = tmp_path / "run", ["--set", "model.width=4", "--set", "training.max_steps=1", "--quiet"]
    for more in (["--board"], ["--histograms", "--overwrite"]):
        command = ["train", "--architecture", "mlp", *small, "--output", str(path), *more]
        assert CliRunner().invoke(cli.app, command).exit_code == 0
        assert len(list((path / FOLDER).iterdir())) == 1
    found = read(path / FOLDER)
    curves = {"loss/train", "loss/validation", "loss/test", "accuracy/test", "training/learning_rate"}
    assert curves | {"norm/parameters", "norm/gradient"} <= set(found.Tags()["scalars"])
    assert [event.step for event in found.Scalars("loss/validation")] == [1]
    assert "weights/1.weight" in found.Tags()["histograms"]
    assert any("Linear[1]" in node.name for node in found.Graph().node)
