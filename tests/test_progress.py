"""What a user sees of a training that goes on, and how it is stopped and gone on with."""

import io
import signal
import sys

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from losslab import cli
from losslab.cli import running, terminal
from losslab.cli.live import LiveTraining
from losslab.status import StopRequested
from losslab.studies.record import RunFolder

ROW = {"kind": "epoch", "epoch": 1, "train_loss": 1.23456, "validation_accuracy": 0.5678, "learning_rate": 0.012}
TINY = ["--architecture", "mlp", "--dataset", "digits", "--batch-size", "64", "--epochs", "2", "--quiet"]
SMALL = ["--set", "model.width=4", "--set", "model.hidden=1", "--set", "dataset.train_examples=256"]  # eight steps


def live(said: list, seconds: list[float]) -> LiveTraining:
    clock = iter(seconds)
    return LiveTraining(lambda *told: said.append(told), batch_size=32, epochs=3, clock=lambda: next(clock))


def test_the_note_says_where_it_is_how_well_it_does_and_how_fast():
    said: list = []
    tick = live(said, [10.0, 12.0, 14.0])
    tick(1, 9, "")
    tick(3, 9, "")
    tick.log(3, ROW)
    tick(5, 9, "")
    assert said == [
        (1, 9, "epoch 1/3  step 1/9"),
        (3, 9, "epoch 1/3  step 3/9  32 samples/s"),
        (5, 9, "epoch 2/3  step 5/9  loss 1.235  accuracy 56.8%  lr 0.012  32 samples/s"),
    ]


def test_the_last_epoch_is_not_followed_by_another():
    said: list = []
    tick = live(said, [0.0])
    tick.log(9, ROW | {"epoch": 3})
    tick.log(9, {"kind": "final", "status": "completed"})
    tick(9, 9, "")
    assert said[0][2].startswith("epoch 3/3  step 9/9  loss 1.235")


def test_a_thousand_fast_steps_are_two_texts_and_the_last_is_told():
    said: list = []
    tick = live(said, [step / 10000 for step in range(1000)])
    for step in range(1, 1001):
        tick(step, 1000, "")
    assert [told[0] for told in said] == [1, 1000]


def rendered(monkeypatch, *, quiet: bool = False, row: dict = ROW, note: str = "", **options) -> str:
    screen = io.StringIO()
    monkeypatch.setattr(terminal, "console", Console(file=screen, width=80, **options))
    with terminal.progress_bar(quiet) as bar:
        tick = LiveTraining(bar, batch_size=32, epochs=3)
        tick.log(1, row)
        tick(5, 9, note)
    return screen.getvalue()


def test_a_terminal_of_80_columns_shows_all_of_it(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    screen = rendered(monkeypatch, force_terminal=True)
    assert "epoch 2/3  step 5/9  loss 1.235  accuracy 56.8%  lr 0.012" in screen
    assert "56%" in screen  # 5/9
    assert "left" in screen
    assert "…" not in screen
    assert "step 5/9  [bold]as it is[/bold]" in rendered(
        monkeypatch, force_terminal=True, row={}, note="[bold]as it is[/bold]"
    )


def test_nothing_where_nobody_looks(monkeypatch):
    monkeypatch.delenv("CI", raising=False)
    assert rendered(monkeypatch, force_terminal=False) == ""
    assert rendered(monkeypatch, force_terminal=True, quiet=True) == ""
    monkeypatch.setenv("CI", "true")
    assert rendered(monkeypatch, force_terminal=True) == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_ends(number):
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with terminal.stop_key(None, unit="step") as tick:
        tick(1, 9, "")
        signal.raise_signal(number)
        assert tick.signal == number
        with pytest.raises(StopRequested):
            tick(2, 9, "")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def losslab(*arguments: str):
    result = CliRunner().invoke(cli.app, ["train", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def metrics(path) -> list[dict]:
    timed = ("seconds", "step_seconds", "peak_memory_bytes", "samples_per_second")
    return [{key: value for key, value in row.items() if key not in timed} for row in RunFolder(path).metrics()]


class Pressed(LiveTraining):
    """During whose third step a signal arrives."""

    number = signal.SIGINT

    def __call__(self, done, total, note):
        if done == 3:
            signal.raise_signal(self.number)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_it_says_how_to_go_on_and_ends_as_if_it_never_was(number, code, tmp_path, monkeypatch):
    whole, stopped = str(tmp_path / "whole"), str(tmp_path / "stopped")
    assert losslab(*TINY, *SMALL, "--output", whole).exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr(running, "LiveTraining", Pressed)
        patch.setattr(Pressed, "number", number)
        result = losslab(*TINY, *SMALL, "--output", stopped, "--board")
    assert result.exit_code == code
    assert "stopped at step 3" in result.output
    assert f"losslab train --resume --output {stopped}" in result.output
    assert RunFolder(stopped).final is None
    again = losslab("--resume", "--output", stopped, "--quiet")
    assert again.exit_code == 0, again.output
    assert metrics(stopped) == metrics(whole)
    assert len(metrics(whole)) == 3
    assert losslab("--resume", "--output", stopped, "--quiet").output == again.output  # nothing left to do
    curves = EventAccumulator(f"{stopped}/tensorboard").Reload()  # go on too
    assert [event.step for event in curves.Scalars("loss/validation")] == [4, 8]


def test_flags_are_settings_and_set_has_the_last_word(tmp_path):
    flags = [*TINY, "--optimizer", "adam", "--lr", "0.01", "--weight-decay", "0.001", "--seed", "3", "--name", "mine"]
    flags += ["--mixed-precision", "--set", "training.max_steps=1", "--output-dir", str(tmp_path)]
    result = losslab(*flags, *SMALL)
    assert result.exit_code == 0, result.output
    config = RunFolder(tmp_path).config
    assert (config["name"], config["seed"], config["model"]["name"]) == ("mine", 3, "mlp")
    assert (config["optimizer"]["name"], config["optimizer"]["lr"]) == ("adam", 0.01)
    assert config["optimizer"]["weight_decay"] == 0.001
    assert (config["training"]["epochs"], config["training"]["precision"]) == (2, "bf16-mixed")
    assert config["dataset"]["batch_size"] == 64


def test_flags_change_what_a_configuration_says(tmp_path):
    result = losslab("--config", "sgd", "--lr", "0.2", *SMALL, "--set", "training.max_steps=1", "-o", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert RunFolder(tmp_path).config["optimizer"]["lr"] == 0.2
    assert RunFolder(tmp_path).config["dataset"]["batch_size"] == 32  # the file's


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "expected a configuration's name or file"),
        (["--enhanced-config"], "'talt' does nothing in sgd"),
        (["--include-theoretical-fixes", "--optimizer", "talt"], "add --tune-hyperparams, or leave it out"),
        (["--include-theoretical-fixes", "--tune-hyperparams", "--optimizer", "adamw"], "expected optimizer talt"),
        (["sgd", "--monitor-theoretical-fixes"], "training.monitor_talt: expected the optimizer talt, got sgd"),
        (["--optimizer", "sgd", "--use-all-theoretical-fixes"], "--use-all-theoretical-fixes: expected optimizer talt"),
        (["sgd", "--n-trials", "3"], "--n-trials: it is of a search; add --tune-hyperparams"),
        (["--resume", "--output", "nowhere"], "--resume: nowhere: no run there"),
        (["adamww"], "adamww: no such file or shipped configuration, did you mean 'adamw'?"),
        (["--optimizer", "adamm"], "did you mean 'adam'"),
        (["--architecture", "simplecn", "--epochs", "1"], "did you mean 'simple_cnn'"),
        (["sgd", "--momentun", "0.9"], "did you mean 'momentum'"),
        (["sgd", "adamw"], "expected one configuration"),
        (["sgd", "--config", "adamw"], "expected one configuration"),
        (["sgd", "--lr", "-1"], "optimizer.lr"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["losslab", "train", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert says in line
    assert not any((tmp_path / "runs").rglob("*.json"))
