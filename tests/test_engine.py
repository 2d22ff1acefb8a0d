"""Many runs: what one does never ends another; killed, stopped and started again they end as if nothing had been."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from fake_worker import use_fake_workers
from losslab.status import StopRequested
from losslab.studies.config import apply, make_config
from losslab.studies.engine import EngineOptions, Job, following, local, resources, run_jobs
from losslab.studies.engine import worker as workers
from losslab.studies.engine.following import last_row
from losslab.studies.lock import locked
from losslab.studies.record import RunFolder
from losslab.studies.train import train


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """The folder of a study whose workers start in no time."""
    use_fake_workers(monkeypatch)
    return tmp_path / "study"


def jobs(folder: Path, *names: str) -> list[Job]:
    return [Job(name, make_config({"name": name, "training": {"epochs": 2}}), folder / name) for name in names]


def statuses(outcomes) -> dict[str, str]:
    return {outcome.name: outcome.status for outcome in outcomes}


def seen(folder: Path) -> list:
    return json.loads((folder / "seen.json").read_text())


def test_what_one_run_does_never_ends_another(fake):
    wanted = jobs(fake, "broken", "good", "clumsy", "mortal", "good-too")
    told = []
    outcomes = run_jobs(wanted, EngineOptions(parallel=2), lambda *args: told.append(args))
    assert [outcome.name for outcome in outcomes] == [job.name for job in wanted]
    expected = {
        "broken": "failed",
        "good": "finished",
        "clumsy": "finished",
        "mortal": "failed",
        "good-too": "finished",
    }
    assert statuses(outcomes) == expected
    broken, good, clumsy, mortal, _ = outcomes
    assert "model.width: no such network" in broken.error
    assert (broken.attempts, good.attempts, clumsy.attempts, mortal.attempts) == (1, 1, 2, 3)
    assert "SIGKILL" in mortal.error
    assert "3 times" in mortal.error
    assert good.seconds >= 0.1
    assert told[-1] == (5, 5, "2 failed, 3 finished")
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert "a long story" in (fake / "broken" / "worker.log").read_text()

    again = run_jobs(wanted, EngineOptions(retries=0))
    assert statuses(again) == {**dict.fromkeys(expected, "skipped"), "broken": "failed", "mortal": "failed"}
    assert [outcome.attempts for outcome in again] == [1, 0, 0, 1, 0]


def test_every_run_has_its_cpus_and_no_more_run_than_are_told(fake):
    names = [f"good-{number}" for number in range(4)]
    run_jobs(jobs(fake, *names), EngineOptions(parallel=2, cpus=1))
    events = []
    for name in names:
        began, ended = map(float, (fake / name / "times.txt").read_text().split())
        events += [(began, 1), (ended, -1)]
    running = [sum(change for _, change in sorted(events)[:count]) for count in range(1, len(events) + 1)]
    assert max(running) == 2
    if hasattr(os, "sched_getaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        pinned = {tuple(seen(fake / name)[1]) for name in names}
        assert pinned == {(cpu,) for cpu in allowed[:2]}
    assert {seen(fake / name)[0] for name in names} == {"1"}


@pytest.mark.parametrize(
    ("cpus", "parallel", "size", "expected"),
    [
        ([0, 1, 2, 3], 2, 2, [(0, 1), (2, 3)]),
        ([3, 5, 7], 1, 3, [(3, 5, 7)]),
        ([3, 5], 3, 1, [(3,), (5,), (3,)]),
        ([3], 2, 4, [(3,), (3,)]),
    ],
)
def test_cpus_are_dealt_out_evenly(cpus, parallel, size, expected):
    assert resources.shares(cpus, parallel, size) == expected


def test_each_run_sees_its_gpus_only(fake, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    wanted = jobs(fake, "endless-a", "endless-b")

    def release(rows):
        if all(row.values for row in rows):
            for job in wanted:
                (job.folder / "release").touch()

    run_jobs(wanted, EngineOptions(parallel=2, gpus=1), table=release)
    assert [seen(job.folder)[2] for job in wanted] == ["4", "6"]


def test_memory_is_promised_to_runs_that_still_grow(monkeypatch):
    sizes = {1: 30, 2: 10}
    monkeypatch.setattr(resources, "_resident", sizes.get)
    gate, free = resources.MemoryGate(), 0

    class Machine:
        available = 0

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Machine)
    assert gate.admits(0)  # one always may
    gate.observe([1, 2])
    for free, admitted in ((49, False), (50, True)):  # 20 more for the second, 30 for the third
        Machine.available = free
        assert gate.admits(2) is admitted
    gate.observe([])
    Machine.available = 59
    assert not gate.admits(1)  # its size is not known yet: 30 may come, and 30 for the next
    assert resources.MemoryGate(known=10**18).admits(0)


def test_runs_that_fill_the_memory_are_made_one_after_another(fake):
    outcomes = run_jobs(jobs(fake, "good", "good-too"), EngineOptions(parallel=2, memory=10**15))
    assert set(statuses(outcomes).values()) == {"finished"}
    first, second = (
        [float(t) for t in (fake / name / "times.txt").read_text().split()] for name in ("good", "good-too")
    )
    assert first[1] < second[0]


@pytest.mark.parametrize("error", [StopRequested, KeyboardInterrupt])
def test_stopped_the_workers_end_and_can_go_on(error, fake):
    wanted = jobs(fake, "good", "endless", "good-later")

    def stop(rows):
        if rows[0].state == "finished" and rows[1].values:
            raise error

    options = EngineOptions(parallel=1)
    if error is StopRequested:
        assert statuses(run_jobs(wanted, options, table=stop)) == {
            "good": "finished", "endless": "stopped", "good-later": "stopped",
        }  # fmt: skip
    else:
        with pytest.raises(KeyboardInterrupt):
            run_jobs(wanted, options, table=stop)
    assert not psutil.pid_exists(seen(fake / "endless")[3])
    assert not (fake / "good-later").exists()
    (fake / "endless" / "release").touch()
    assert statuses(run_jobs(wanted)) == {"good": "skipped", "endless": "finished", "good-later": "finished"}


def test_what_is_in_a_folder_is_not_overwritten(fake):
    wanted = jobs(fake, "good", "foreign", "other", "file", "damaged")
    (fake / "foreign").mkdir(parents=True)
    (fake / "foreign" / "thesis.tex").write_text("mine")
    (fake / "file").write_text("mine")
    RunFolder.create(fake / "other").write_config({**wanted[2].config.model_dump(mode="json"), "seed": 7})
    RunFolder.create(fake / "damaged").write_config(wanted[4].config.model_dump(mode="json"))
    (fake / "damaged" / "metrics.jsonl").write_text("{no json\n")
    errors = {outcome.name: outcome.error for outcome in run_jobs(wanted)}
    assert errors["good"] is None
    assert "not empty" in errors["foreign"]
    assert "seed: 7 there, 0 now" in errors["other"]
    assert errors["file"] is not None
    assert "line 1 is not JSON" in errors["damaged"]
    assert [path.name for path in (fake / "foreign").iterdir()] == ["thesis.tex"]
    assert (fake / "file").read_text() == "mine"


def test_the_table_tells_of_every_run(fake):
    rows = []
    run_jobs(jobs(fake, "clumsy", "broken"), table=lambda table: rows.append({row.name: row for row in table}))
    assert list(rows[-1]) == ["clumsy", "broken"]
    last = rows[-1]["clumsy"]
    assert (last.state, last.attempts, last.done, last.values["test_accuracy"]) == ("finished", 2, 1.0, 0.75)
    assert "model.width" in rows[-1]["broken"].error
    states = list(dict.fromkeys(table["clumsy"].state for table in rows))
    assert states[-2:] == ["running", "finished"]
    under_way = next(table["clumsy"] for table in rows if table["clumsy"].values and table["clumsy"].state == "running")
    assert under_way.done == 0.5
    assert under_way.values["train_loss"] == 0.5


def test_the_last_row_that_was_written_whole(tmp_path):
    assert last_row(tmp_path) == {}
    folder = RunFolder(tmp_path)
    for step in range(2000):
        folder.log(step, {"kind": "epoch", "train_loss": float("nan") if step == 1999 else 0.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2000, "tra')
    row = last_row(tmp_path)
    assert row["step"] == 1999
    assert row["train_loss"] != row["train_loss"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"parallel": 0}, "parallel: expected an integer >= 1, got 0"),
        ({"retries": -1}, "retries: expected an integer >= 0, got -1"),
        ({"engine": "slurm"}, "expected 'local' or 'ray', got 'slurm'"),
        ({"address": "auto"}, "use engine 'ray'"),
    ],
)
def test_options_that_cannot_be(options, says):
    with pytest.raises(ValueError, match=says):
        EngineOptions(**options)


def test_two_jobs_never_share_a_name_or_a_folder(tmp_path):
    first, second = jobs(tmp_path, "a", "b")
    with pytest.raises(ValueError, match="different name"):
        run_jobs([first, Job("a", second.config, second.folder)])
    with pytest.raises(ValueError, match="different folder"):
        run_jobs([first, Job("b", second.config, first.folder)])


def test_a_folder_is_held_by_one_process(tmp_path):
    """Another one is told who holds it, and takes over when it is killed."""
    program = (
        "import time\nfrom pathlib import Path\nfrom losslab.studies.lock import locked\n"
        f"with locked(Path({str(tmp_path)!r})):\n    print('held', flush=True)\n    time.sleep(1000)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"held\n"
            with pytest.raises(BlockingIOError, match=f"process {holder.pid} on .*, since 20.*works here"):
                locked(tmp_path).__enter__()
        finally:
            holder.send_signal(signal.SIGKILL)
    with locked(tmp_path):
        assert json.loads((tmp_path / ".lock.json").read_text())["pid"] == os.getpid()
    assert not (tmp_path / ".lock.json").exists()


def test_ray_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'losslab\[ray\]'"):
        run_jobs(jobs(tmp_path, "a"), EngineOptions(engine="ray"))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "127.0.0.1:port"])
def test_a_cluster_that_is_not_there(address, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed")
    with pytest.raises(ConnectionError, match=f"address: no Ray cluster answers at {address}: "):
        run_jobs(jobs(tmp_path, "a"), EngineOptions(engine="ray", address=address))


def small(name: str, folder: Path, epochs: int = 30) -> Job:
    """A run of a second or two."""
    values = {
        "name": name,
        "model": {"name": "mlp", "width": 8},
        "dataset": {"train_examples": 256, "batch_size": 32},
        "optimizer": {"momentum": 0.9},
        "training": {"epochs": epochs, "device": "cpu"},
    }
    return Job(name, make_config(values), folder / name)


def without_times(rows: list[dict]) -> list[dict]:
    unlike = ("seconds", "samples_per_second", "step_seconds", "peak_memory_bytes")
    return [{key: value for key, value in row.items() if key not in unlike} for row in rows]


@pytest.fixture
def worker(monkeypatch):
    """The worker's work, in this process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(workers, "keep_freed_memory", lambda: True)
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    yield lambda job, parent: workers.local_work(job.config.model_dump(mode="json"), job.folder, parent)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_worker_ends_when_the_engine_is_gone(tmp_path, worker):
    """Whoever was killed leaves nobody at work, and nothing lost: one step is done, and the next worker goes on."""
    job = small("run", tmp_path, epochs=2)
    assert worker(job, parent=-1) == 130
    folder = RunFolder(job.folder)
    assert folder.final is None
    assert (folder.path / "checkpoints").is_dir()
    assert worker(job, parent=os.getppid()) == 0
    assert without_times(folder.metrics()) == without_times(train(job.config, RunFolder(tmp_path / "never")).metrics())


def test_a_worker_s_last_line_says_what_is_wrong(tmp_path, worker, capsys):
    job = small("run", tmp_path)
    wrong = Job("run", apply(job.config, {"model.name": "mlpp"}), job.folder)
    assert worker(wrong, parent=os.getppid()) == 2
    assert "did you mean 'mlp'?" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_a_killed_run_ends_as_if_never_killed(tmp_path, monkeypatch):
    """The real worker, killed by its process number in the middle; what the log and the lock say of it."""
    monkeypatch.setattr(following, "PERIOD", 0.0)
    monkeypatch.setattr(local, "POLL", 0.01)
    job = small("run", tmp_path)
    killed: list[int] = []
    before: list[dict] = []

    def kill(rows):
        # From the second row on the first one's checkpoint is written.
        if rows[0].state == "running" and not killed and 2 <= rows[0].values.get("epoch", 0) < 30:
            killed.append(json.loads((job.folder / ".lock.json").read_text())["pid"])
            os.kill(killed[0], signal.SIGKILL)
            before.extend(RunFolder(job.folder).metrics())

    (outcome,) = run_jobs([job], EngineOptions(cpus=1), table=kill)
    assert killed, "it was over before it could be killed"
    assert (outcome.status, outcome.attempts) == ("finished", 2)
    log = (job.folder / "worker.log").read_text()
    assert log.count("--- started") == 2
    assert f"process {killed[0]}\n" in log
    rows = RunFolder(job.folder).metrics()
    assert rows[0] == before[0]  # with its seconds: it went on, and was not made anew
    never = train(job.config, RunFolder.create(tmp_path / "never"))
    assert without_times(rows) == without_times(never.metrics())


@pytest.mark.slow
def test_a_ray_node_that_dies_loses_nothing(tmp_path, monkeypatch):
    """Two nodes, a run on each; one node is killed in the middle, and its run goes on where it was on the other."""
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="Ray is not installed")
    import ray

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setattr(following, "PERIOD", 0.0)
    wanted = [small("first", tmp_path, epochs=200), small("second", tmp_path, epochs=200), small("broken", tmp_path)]
    wanted[2] = Job("broken", apply(wanted[2].config, {"model.name": "mlpp"}), wanted[2].folder)
    ports = {"include_dashboard": False, "num_cpus": 1}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=ports)
    killed = []

    def kill(rows):
        if not killed and all(row.values and row.done < 1 for row in rows[:2]):
            killed.append(node)
            cluster.remove_node(node, allow_graceful=False)

    try:
        node = cluster.add_node(num_cpus=1)
        options = EngineOptions(engine="ray", address=cluster.address)
        first, second, broken = run_jobs(wanted, options, table=kill)
        assert not ray.is_initialized()
    finally:
        cluster.shutdown()
    assert killed, "it was over before the node could be killed"
    assert statuses([first, second]) == {"first": "finished", "second": "finished"}
    assert sorted([first.attempts, second.attempts]) == [1, 2]
    assert (broken.status, "did you mean 'mlp'?" in broken.error) == ("failed", True)
    rows = [without_times(RunFolder(job.folder).metrics()) for job in wanted[:2]]
    assert rows[0] == rows[1]  # two runs of one configuration, of which one was killed
    assert rows[0][-1]["step"] == 1600
