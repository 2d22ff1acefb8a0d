"""The network that a probe looks at: from a run, a file of weights, or a configuration alone; and older names."""

import pytest
import torch
from typer.testing import CliRunner

from losslab import cli
from losslab.studies.aliases import assignments, probe_name
from losslab.studies.models import build_model
from losslab.studies.record import RunFolder
from losslab.studies.sections import RunConfig
from losslab.studies.solution import find_solution, initial, load_weights
from losslab.studies.train import train

CONFIG = """name: small
model: {name: mlp, width: 5, hidden: 1}
training: {epochs: 1, device: cpu}
probes: {examples: 32}
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("configs") / "small.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = RunFolder.create(tmp_path_factory.mktemp("runs") / "small")
    settings = {"model": {"name": "mlp", "width": 5, "hidden": 1}, "training": {"epochs": 1, "device": "cpu"}}
    train(RunConfig.model_validate(settings), folder)
    return folder


def weights(found) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(found.model.parameters()).detach()


def test_a_run_and_the_path_of_its_checkpoint_are_the_same(run):
    by_run = find_solution(run.path)
    by_path = find_solution(checkpoint=run.path / "checkpoints" / "last.safetensors")
    assert torch.equal(weights(by_run), weights(by_path))
    assert by_path.folder.path == run.path
    assert by_path.step == by_run.step > 0


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state, "epoch": 3}])
def test_any_weights_with_a_configuration(run, config, tmp_path, wrap):
    model = find_solution(run.path).model
    path = tmp_path / "checkpoint.pt"
    torch.save(wrap(model.state_dict()), path)
    found = find_solution(checkpoint=path, config=config)
    assert torch.equal(weights(found), weights(find_solution(run.path)))
    assert found.folder.path == tmp_path


def test_only_a_configuration_is_its_initial_network(config, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(11)
    first, again = find_solution(config=config), find_solution(config=config)
    assert torch.equal(weights(first), weights(again))
    assert (first.step, first.folder.path.name) == (0, "small")
    assert torch.randn(1) == torch.randn(1, generator=torch.Generator().manual_seed(11))  # nobody's seed was touched


def test_the_initial_network_is_the_one_that_training_starts_from(config):
    settings = find_solution(config=config).config.model_copy(update={"seed": 3})
    with torch.random.fork_rng():
        torch.manual_seed(3)
        expected = build_model(settings.model, (1, 8, 8), 10)
    got = torch.nn.utils.parameters_to_vector(initial(settings).parameters())
    assert torch.equal(got, torch.nn.utils.parameters_to_vector(expected.parameters()))


def test_wrong_ways_are_said(run, config, tmp_path):
    with pytest.raises(ValueError, match="run: expected a run folder"):
        find_solution()
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        find_solution(checkpoint=tmp_path / "none.safetensors", config=config)
    other = tmp_path / "other.yaml"
    other.write_text(CONFIG.replace("width: 5", "width: 6"))
    with pytest.raises(ValueError, match="another model than the run"):
        find_solution(checkpoint=run.path / "checkpoints" / "last.safetensors", config=other)
    torch.save({"nothing": torch.zeros(1)}, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match=r"foreign\.pt: not this model's weights"):
        find_solution(checkpoint=tmp_path / "foreign.pt", config=config)


def test_nothing_in_a_file_is_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"state_dict": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(ValueError, match="not this model's weights"):
        load_weights(torch.nn.Linear(1, 1), tmp_path / "bomb.pt")


def test_older_names():
    assert [probe_name(name) for name in ("lanczos", "sgd-noise", "auto_neb", "plane")] == [
        "spectrum",
        "noise",
        "elastic_band",
        "plane",
    ]


def test_options_are_settings():
    given = ["--k", "3", "--tol=1e-2", "--recalibrate", "--seed", "42"]
    assert list(assignments("spectrum", given)) == ["k=3", "tol=1e-2", "recalibrate=true", "seed=42"]
    assert list(assignments("intrinsic_dimension", ["--d_sub", "15"])) == ["dimension=15"]
    with pytest.raises(ValueError, match="3: expected --NAME VALUE"):
        list(assignments("spectrum", ["3"]))


@pytest.mark.parametrize(
    "arguments",
    [
        ["lanczos", "--checkpoint", "A", "--k", "3", "--seed", "42"],
        ["sgd_noise", "--checkpoint", "A", "--seed", "42", "--tol", "0.1"],
        ["perturbation", "--checkpoint", "A", "--seed", "42", "--resolution", "5"],
        ["intrinsic_dim", "--d_sub", "3", "--seed", "42", "--steps", "3", "--num-seeds", "1"],
        ["interpolation", "--ckpt_a", "A", "--ckpt_b", "B", "--steps", "5"],
        ["auto_neb", "--ckpt_a", "A", "--ckpt_b", "B", "--n_nodes", "3", "--iters", "2", "--seed", "42"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_the_founding_command_lines_run(arguments, run, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = find_solution(run.path).model
    torch.save(model.state_dict(), "A.pt")
    torch.save({name: -value for name, value in model.state_dict().items()}, "B.pt")
    given = [{"A": "A.pt", "B": "B.pt"}.get(argument, argument) for argument in arguments]
    result = CliRunner().invoke(cli.app, ["probe", *given, "--config", str(config), "--quiet"])
    assert result.exit_code == 0, (result.output, result.exception)
    assert list(tmp_path.rglob("*.json"))
