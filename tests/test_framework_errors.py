"""What goes wrong around a training, from the command line: one line, exit code 2, and nothing lost or half-written."""

import errno
import io
import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from losslab import cli
from losslab.studies import checkpoint
from losslab.studies.record import RunFolder

SMALL = ["--set", "dataset.train_examples=48", "--set", "dataset.batch_size=8", "--epochs", "2", "--quiet"]
MLP = ["--architecture", "mlp", "--set", "model.width=4", *SMALL, "--set", "training.device=cpu"]
TIMES = ("seconds", "samples_per_second", "step_seconds", "peak_memory_bytes")


def losslab(arguments, monkeypatch, capsys) -> tuple[int, str]:
    """The exit code, and what was said on stderr."""
    monkeypatch.setattr(sys, "argv", ["losslab", *map(str, arguments)])
    try:
        cli.main()
        code = 0
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    return code, capsys.readouterr().err.strip()


def refusal(arguments, monkeypatch, capsys) -> str:
    code, said = losslab(arguments, monkeypatch, capsys)
    assert code == 2, said
    assert len(said.splitlines()) == 1, said
    assert "Traceback" not in said
    return said


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def metrics(folder: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in RunFolder(folder).metrics()]


class Disk:
    """A disk with room for so many whole files and rows; what comes next breaks off in the middle."""

    def __init__(self, monkeypatch, room: int):
        self.room, self.full = room, False
        path_open = Path.open

        def opened(path, mode="r", *args, **kwargs):
            file = path_open(path, mode, *args, **kwargs)
            if mode in ("wb", "a"):
                self._limit(file)
            return file

        monkeypatch.setattr(Path, "open", opened)

    def _limit(self, file: io.IOBase) -> None:
        if self.room == 0:
            self.full = True
            write = file.write

            def half(content):
                write(content[: len(content) // 2])
                raise OSError(errno.ENOSPC, "No space left on device")

            file.write = half
        self.room -= 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> list[dict]:
    """The metrics of a run that nothing happened to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert CliRunner().invoke(cli.app, ["train", *MLP, "--output", str(run)]).exit_code == 0
    return metrics(run)


# Files and rows of a run in their order: config, environment, metrics made empty, then for each of the two epochs its
# row, the checkpoint "best" if it is better, and "last"; at the end the final row.
@pytest.mark.parametrize(
    ("room", "what", "kept"),
    [(0, "config.json", []), (3, "metrics.jsonl", []), (5, "last", [6]), (6, "metrics.jsonl", [6, 6])],
)
def test_disk_full(room, what, kept, whole, tmp_path, monkeypatch, capsys):
    """One line names the file; the last good checkpoint is whole; with room again the run ends as if nothing was."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        disk = Disk(patch, room)
        said = refusal(["train", *MLP, "--output", run], patch, capsys)
    assert disk.full
    assert "No space left on device" in said
    assert what in said
    assert not list(run.rglob("*.tmp"))
    assert [checkpoint.load(RunFolder(run), name).step for name in checkpoint.names(RunFolder(run))] == kept
    assert losslab(["train", *MLP, "--output", run, "--resume"], monkeypatch, capsys) == (0, "")
    assert metrics(run) == whole
    assert RunFolder(run).final["status"] == "completed"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "sgdd"], "no such file"),
        (["train", "sgd", "--architecture", "simple_cn"], "did you mean 'simple_cnn'"),
        (["train", "sgd", "--dataset", "digit"], "did you mean 'digits'"),
        (["train", "sgd", "--dataset", "cifar_10"], "did you mean 'cifar10'"),
        (["train", "--architecture", "mlp", "--optimizer", "shampo"], "did you mean 'shampoo'"),
        (["train", "sgd", "--set", "schedule.name=one_cycl"], "did you mean 'one_cycle'"),
        (["train", "sgd", "--set", "training.target={value: 1, metric: train_los}"], "did you mean 'train_loss'"),
        (["train", "sgd", "--set", "training.target.value=97"], "training.target.value: expected an accuracy > 0 and"),
        (["train", "sgd", "--set", "trainning.epochs=3"], "did you mean 'training'"),
        (["train", "sgd", "--set", "dataset.augment=[flop]"], "expected"),
        (["train", "sgd", "--set", "model.name=module:nowhere.network"], "no module 'nowhere'"),
        (["train", "sgd", "--set", "dataset.name=arrays:nowhere.npz"], "nowhere.npz is not there"),
        (["train", "sgd", "--set", "dataset.name=cifar10", "--set", "dataset.root=nowhere"], "dataset.download=true"),
    ],
)
def test_unknown_names(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert says in refusal([*arguments, "--output", "run"], monkeypatch, capsys)
    assert not files(tmp_path)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> Path:
    """A GLUE folder of forty short reviews."""
    folder = tmp_path_factory.mktemp("glue") / "SST-2"
    folder.mkdir()
    for name in ("train", "dev"):
        rows = [f"a {word} film {n}\t{label}\n" for n in range(20) for word, label in (("fine", 1), ("dull", 0))]
        (folder / f"{name}.tsv").write_text("sentence\tlabel\n" + "".join(rows))
    return folder.parent


TEXTS = ["--dataset", "sst2", "--set", "dataset.vocabulary=60", "--set", "dataset.root={glue}"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--architecture", "bert_tiny"], "bert_tiny takes texts, got (1, 8, 8); use simple_cnn"),
        (["--architecture", "simple_cnn", *TEXTS], "simple_cnn takes (channels, height, width), got texts"),
        (["--architecture", "mlp", *TEXTS], "mlp takes numbers, got texts"),
        (["--architecture", "bert_tiny", "--set", "dataset.augment=[flip]", *TEXTS], "expected images"),
        (["--architecture", "mlp", "--set", "model.batch_norm=true"], "mlp has none"),
        (["--architecture", "simple_cnn", "--set", "model.pretrained=x"], "simple_cnn takes none"),
        (["--optimizer", "adamw", "--set", "optimizer.nesterov=true"], "does nothing in adamw"),
        (["--optimizer", "sam", "--set", "training.precision=16-mixed"], "sam cannot scale"),
        (["--set", "training.precision=16-mixed", "--set", "training.device=cpu"], "16-mixed needs an accelerator"),
        (["--set", "training.device=mps"], "mps is not there"),
    ],
)
def test_impossible_combinations(arguments, says, reviews, tmp_path, monkeypatch, capsys):
    arguments = [argument.format(glue=reviews) for argument in arguments]
    assert says in refusal(["train", *SMALL, *arguments, "--output", tmp_path / "run"], monkeypatch, capsys)
    assert not files(tmp_path)


@pytest.mark.parametrize("command", ["train", "batch", "tune", "compare"])
def test_a_folder_of_somebody_else_is_left_alone(command, tmp_path, monkeypatch, capsys):
    """Neither written to nor deleted from, whatever the command."""
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    (foreign / "config.json").write_text(json.dumps({"mine": 1}))
    before = files(foreign)
    batch, plan = tmp_path / "batch.json", tmp_path / "plan.json"
    run = {"name": "one", "model": {"name": "mlp", "width": 4}, "training": {"epochs": 1, "max_steps": 1}}
    batch.write_text(json.dumps({"runs": [run]}))
    two = [{"name": name, "changes": {"optimizer.name": name}} for name in ("sgd", "adam")]
    plan.write_text(json.dumps({"base": run, "optimizers": two, "trials": 1}))
    arguments = {
        "train": [*MLP, "--output", foreign],
        "batch": ["--config", batch, "--output-dir", foreign, "--quiet"],
        "tune": ["sgd", "--output", foreign, "--trials", "1", "--quiet"],
        "compare": [plan, "--output", foreign, "--quiet"],
    }
    said = refusal([command, *arguments[command]], monkeypatch, capsys)
    assert str(foreign) in said
    assert files(foreign) == before


def test_a_run_is_gone_on_with_or_replaced_but_never_mixed(tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    assert losslab(["train", *MLP, "--output", run], monkeypatch, capsys) == (0, "")
    before = files(run)
    assert "--overwrite" in refusal(["train", *MLP, "--output", run], monkeypatch, capsys)
    other = ["train", *MLP, "--lr", "0.02", "--output", run]
    said = refusal([*other, "--resume"], monkeypatch, capsys)
    assert "another configuration" in said
    assert "optimizer.lr" in said
    assert files(run) == before
    assert losslab([*other, "--overwrite"], monkeypatch, capsys) == (0, "")
    assert RunFolder(run).config["optimizer"]["lr"] == 0.02


def test_a_diverged_run_has_not_reached_its_target(tmp_path, monkeypatch, capsys):
    target = ["--set", "training.target.value=0.0", "--set", "training.target.metric=train_loss"]
    run = tmp_path / "run"
    assert losslab(["train", *MLP, *target, "--lr", "1e30", "--output", run], monkeypatch, capsys) == (0, "")
    final = RunFolder(run).final
    assert final["status"] == "diverged"
    assert [final[key] for key in ("reached_step", "reached_seconds", "reached_epoch")] == [None] * 3
