"""Several processes give the answers of one: unequal shards, none at all, Krylov bases in parts."""

import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.testing import assert_close
from typer.testing import CliRunner

from cases import CASES, normal
from losslab.cli import app
from losslab.operators.fisher import Fisher
from losslab.operators.gauss_newton import GaussNewton
from losslab.operators.gradient_covariance import GradientCovariance
from losslab.operators.hessian import Hessian
from losslab.operators.risk import EmpiricalRisk
from losslab.probes.spectrum import SpectrumOptions, SpectrumResult, spectrum
from losslab.ranks import Ranks, Split
from losslab.solvers.density import spectral_density
from losslab.solvers.diagonal import diagonal
from losslab.solvers.frobenius import frobenius_norm
from losslab.solvers.krylov import Krylov
from losslab.solvers.lanczos import eigenpairs
from losslab.solvers.trace import trace
from losslab.studies.record import RunFolder
from processes import free_port, run_ranks

CASE = "ragged MSE"  # batches of 3, 3, 3, 1 examples
OWNERS = [0, 0, 2, 2]  # of the batches: processes 0, 1, 2 hold 6, 0 and 4 examples


def number(value) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def measured(ranks: Ranks) -> dict:
    """Everything that depends on the data or on whole vectors."""
    case = CASES[CASE]()
    own = [batch for i, batch in enumerate(case.batches) if ranks.count == 1 or OWNERS[i] == ranks.rank]
    risk = EmpiricalRisk(case.model, case.loss_fn, own, ranks=ranks, **case.kwargs)
    hessian, vectors = Hessian(risk), normal(risk.space.size, 3, seed=5)
    pairs = eigenpairs(hessian, 4, which="both_ends", tol=1e-10, max_basis=16, seed=1)
    density = spectral_density(hessian, num_probes=2, num_nodes=12)
    estimates = [trace(hessian, method=m, max_matvecs=24) for m in ("hutchinson", "hutch++", "xtrace")]
    estimates.append(frobenius_norm(hessian, max_matvecs=24))
    diagonals = [diagonal(hessian, method=m, max_matvecs=24) for m in ("hutchinson", "xdiag")]
    report = spectrum(risk, 3, options=SpectrumOptions(num_nodes=20, trace_tol=1e-12, trace_samples=12))
    few = EmpiricalRisk(case.model, case.loss_fn, own, ranks=ranks, max_examples=7, **case.kwargs)
    sampled = spectrum(few, 2).sampling
    return {
        "num_examples": risk.num_examples,
        "loss": number(risk.loss()),
        "gradient": risk.gradient(),
        "Hessian": hessian @ vectors,
        "GradientCovariance": GradientCovariance(risk) @ vectors,
        "GaussNewton": GaussNewton(risk) @ vectors,
        "Fisher": Fisher(risk) @ vectors,
        "eigenvalues": torch.from_numpy(pairs.values),
        "residuals of the vectors": (hessian @ pairs.vectors - pairs.vectors * torch.from_numpy(pairs.values)).norm(),
        "products": pairs.matvecs,
        "estimates": number([[e.value, e.standard_error] for e in estimates]),
        "diagonals": torch.stack([d.values for d in diagonals] + [d.standard_error for d in diagonals]),
        "density": torch.from_numpy(density.density),
        "top": torch.from_numpy(report.top),
        "norm": number([report.frobenius_norm.value, report.frobenius_norm.standard_error]),
        "subset's loss": number(few.loss()),
        "subset's size": few.num_examples,
        "sampling": number([sampled.top, sampled.trace]),
        "basis": torch.tensor(Krylov(hessian, vectors[:, 0], 10).basis.shape),
    }


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> list[dict]:
    return run_ranks(measured, 3, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone() -> dict:
    return measured(Ranks())


def test_several_processes_give_the_answers_of_one(together, alone):
    for found in together:
        assert found.keys() == alone.keys()
        for name, expected in alone.items():
            if name in ("basis", "residuals of the vectors"):
                continue
            if isinstance(expected, torch.Tensor):
                assert_close(found[name], expected, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
            else:
                assert found[name] == expected, name
        assert found["residuals of the vectors"] < 1e-8


def test_the_same_bits_on_every_process(together):
    for name in ("Hessian", "eigenvalues", "density"):
        assert all(torch.equal(found[name], together[0][name]) for found in together)


def test_each_process_keeps_its_part_of_the_basis(together, alone):
    rows, size = alone["basis"].tolist()
    parts = [found["basis"].tolist() for found in together]
    assert all(part[0] == rows for part in parts)
    assert sum(part[1] for part in parts) == size
    assert max(part[1] for part in parts) == -(-size // 3)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 9])
def test_parts_cover_a_vector_once(size):
    ranks = [Ranks() for _ in range(3)]
    for rank, one in enumerate(ranks):
        one.rank, one.count = rank, 3
    vector = torch.arange(float(size))
    parts = [Split(size, one).part(vector) for one in ranks]
    assert torch.equal(torch.cat(parts), vector)
    assert [len(part) for part in parts] == [Split(size, one).local_size for one in ranks]


def search_and_die(rank: int, port: int, folder: Path) -> None:
    """Process 1 dies after three products; process 0 leaves the complaint that it ends with in the folder."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}

    def die(done, total, note):
        if rank == 1 and done == 3:
            os._exit(7)

    try:
        with Ranks.joined() as ranks:
            case = CASES[CASE]()
            risk = EmpiricalRisk(case.model, case.loss_fn, case.batches[rank::2], ranks=ranks)
            eigenpairs(Hessian(risk), 3, tol=1e-12, progress=die)
    except RuntimeError as error:
        (folder / "complaint").write_text(str(error))
        raise


def test_a_process_that_dies_ends_the_others_with_a_clear_error(tmp_path):
    process, port = mp.get_context("forkserver").Process, free_port()
    survivor, dying = (process(target=search_and_die, args=(rank, port, tmp_path)) for rank in range(2))
    for one in (survivor, dying):
        one.start()
    for one in (dying, survivor):
        one.join(timeout=60)  # within a minute of the death
    assert (survivor.exitcode, dying.exitcode) == (1, 7)
    complaint = (tmp_path / "complaint").read_text()
    assert "process 0 of 2: another process ended or does not answer, so there is no result" in complaint


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "mlp"
    changes = ["--set=model.name=mlp", "--set=model.width=8", "--set=training.epochs=1", "--set=probes.batch_size=64"]
    result = CliRunner().invoke(app, ["train", "sgd", "--output", str(path), "--quiet", *changes])
    assert result.exit_code == 0, result.exception
    return path


def command(*arguments: str) -> str:
    """What `losslab` prints with these arguments."""
    torch.set_num_threads(1)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.exception
    return result.output


def torchrun(*arguments: str) -> list[str]:
    """What `losslab` prints on each of two processes that torchrun's launcher starts: forked, for they start faster."""
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="test", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        max_restarts=0, start_method="forkserver",
    )  # fmt: skip
    printed = elastic_launch(config, command)(*arguments)
    return [printed[rank] for rank in range(2)]


def test_torchrun_probes_together_and_writes_once(trained):
    settings = ["--set=k=2", "--set=num_nodes=15", "--set=trace_samples=8"]
    first, second = torchrun("probe", "spectrum", "--from", str(trained), *settings)
    assert first.count("largest eigenvalues") == 1
    assert not second
    found = SpectrumResult.from_record(*RunFolder(trained).read_record("spectrum"))
    command("probe", "spectrum", "--run", str(trained), *settings)
    expected = SpectrumResult.from_record(*RunFolder(trained).read_record("spectrum"))
    assert found.trace.value == pytest.approx(expected.trace.value, rel=1e-4)
    assert (found.matvecs, found.num_examples) == (expected.matvecs, expected.num_examples)
