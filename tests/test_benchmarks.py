"""The benchmarks run, at their smallest settings, and their own arithmetic is right. What they time is not tested."""

import contextlib
import importlib
import importlib.util
import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from losslab import Hessian
from losslab.studies.models import SimpleCNN

FOLDER = Path(__file__).parents[1] / "benchmarks"
DATA = ["--examples=8", "--batch-size=4", "--width=2", "--train-examples=16", "--epochs=1"]
TINY = [*DATA, "--repeats=1", "--threads=1"]


@pytest.fixture
def printed(load, monkeypatch, capsys):
    """Run a script's `main` with these arguments; what it prints."""

    def run(name, *arguments):
        script = load(name)
        monkeypatch.setattr(sys, "argv", [str(FOLDER / f"{name}.py"), *arguments])
        script.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def inline(load, monkeypatch):
    """Let a script do in this process what it starts processes for: importing torch takes longer than all the rest."""
    monkeypatch.setattr(Hessian, "_matmat", Hessian._matmat)  # counting stays in place until the process ends

    def use(name):
        script = load(name)

        def here(_, arguments, timeout):
            with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
                patch.setattr(sys, "argv", [name, *arguments])
                script.main()
            return json.loads(out.getvalue().splitlines()[-1])

        monkeypatch.setattr(script, "in_a_fresh_process", here)
        monkeypatch.setattr(script, "limit_memory", lambda: None, raising=False)

    return use


def row(text, start):
    """The cells of the first row of a table that starts so."""
    (line, *_) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


# -- the scripts ------------------------------------------------------------------------------------------


def test_peers(printed, inline, tmp_path):
    file = tmp_path / "peers.md"
    inline("peers")
    methods = ["--methods", "losslab", "losslab-streamed"]
    text = printed("peers", *TINY, f"--cache={tmp_path}", f"--output={file}", *methods)
    assert file.read_text() == text.removesuffix("\n")
    assert row(text, "losslab |")[2] == "1.00"
    assert float(row(text, "losslab |")[6]) < 1e-3
    assert all(float(row(text, f"{name}, graphs of 2 of 2")[1].split()[0]) > 0 for name in ("Hessian", "Gauss–Newton"))


def test_report(printed, inline, tmp_path):
    inline("report")
    small = ["--reference-probes=2", "--reference-nodes=20"]
    text = printed("report", *TINY, f"--cache={tmp_path}", *small, "--methods", "losslab")
    costs, errors = text.split("| largest error")
    assert row(costs, "losslab (")[2] == "1.00"
    top, smallest, density, trace = map(float, row(errors, "losslab |")[1:])
    assert max(top, smallest) < 1e-3
    assert density < 1
    assert trace < 1


@pytest.mark.parametrize(
    ("name", "package"),
    [("hessian-eigenthings", "hessian_eigenthings"), ("curvlinops", "curvlinops"), ("pyhessian", "pyhessian")],
)
def test_each_package_answers_as_it_did(load, monkeypatch, name, package):
    pytest.importorskip(package)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))
    batches = [(torch.randn(20, 6), torch.arange(20) % 4) for _ in range(2)]
    problem = load("problem").Problem(model, nn.CrossEntropyLoss(), batches, {})
    problem.known.update(load("reference").reference(problem, 4, 60))
    problem.known.update({"steps": [(60, 60)], "hutch++": 96, "xtrace": 96})
    method = load("report_methods").METHODS[name]
    module, _, path = method.product.call.partition(":")
    owner, _, product = path.partition(".")
    cls = getattr(importlib.import_module(module), owner)
    monkeypatch.setattr(cls, product, getattr(cls, product))  # the counting one goes at the end
    result = load("report").measure(method, problem, 0)
    errors = result["errors"]
    assert errors["trace"] < 0.2
    if name == "pyhessian":  # of its release 0.1
        assert result["failures"]["density"].startswith("RuntimeError")
        assert result["products"]["top"] >= 10
        return
    assert not result["failures"]
    assert max(errors["top"], errors["smallest"]) < 1e-2
    assert errors["density"] < 0.5


def test_a_package_that_is_not_there_is_said_so(load):
    report = load("report")
    text = "\n".join(report.costs_table([{"pyhessian": {"failure": "not installed (pip …): pyhessian"}}]))
    assert row(text, "PyHessian")[1] == "failed 1 of 1 times: not installed (pip …): pyhessian"
    assert report.errors_table([{"pyhessian": {"failure": "not installed"}}])[2:] == []


def test_overhead(printed):
    text = printed("overhead", "--parameters=30000", "--examples=16", "--batch-size=8", "-k=2")
    for solver in ("eigenpairs", "spectrum"):
        table = text.split(f"| {solver} |")[1].split("\n\n")[0]
        shares = [float(cell.strip(" %")) for cell in re.findall(r"\| *([\d.]+)% *\|", table)]
        assert sum(shares) == pytest.approx(100, abs=1)
        (rest,) = re.findall(r"\| everything else \| [\d.]+ \| ([\d.]+)%", table)
        assert float(rest) < 60


def test_overhead_knows_the_functions_that_it_names(load):
    source = "".join(path.read_text() for path in (FOLDER.parent / "src" / "losslab").rglob("*.py"))
    overhead = load("overhead")
    for functions in [overhead.PRODUCTS, *overhead.PARTS.values()]:
        for _, name in functions:
            assert f"def {name}(" in source, name


@pytest.mark.slow
def test_scaling(printed, load, inline, monkeypatch):
    """One process is this one; two are torchrun's."""
    scaling = load("scaling")
    fresh = scaling.in_a_fresh_process
    inline("scaling")
    here = scaling.in_a_fresh_process

    def started(script, arguments, timeout, launcher):
        return fresh(script, arguments, timeout, launcher) if launcher else here(script, arguments, timeout)

    monkeypatch.setattr(scaling, "in_a_fresh_process", started)
    points = [scaling.point(200, examples=12, batch_size=4), scaling.point(200, examples=12, batch_size=4, processes=2)]
    monkeypatch.setattr(scaling, "series", lambda quick: {"processes": ("processes", points)})
    text = printed("scaling", "--quick")
    assert row(text, "1 |")[3] == row(text, "2 |")[3] == str(scaling.STEPS)
    assert "two processes: a product" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures in earnest where there is a GPU")
def test_gpu_without_one(printed):
    assert printed("gpu").startswith("no CUDA device here")


def test_gpu_smoke(printed):
    text = printed("gpu", "--smoke", "--rounds=1", "--networks", "gpt", "--ways", "kept")
    assert float(row(text, "losslab, graph kept")[2]) > 0


@pytest.mark.parametrize("network", ["resnet18", "resnet50", "gpt"])
@pytest.mark.parametrize("way", ["kept", "streamed", "gauss-newton", "autograd", "functional"])
def test_gpu_ways_agree(load, network, way):
    case = load("gpu_models").cases(torch.device("cpu"), smoke=True)[network]()
    assert load("gpu").measure(case, way, smoke=True, rounds=1)["difference"] < 1e-5


def test_gpu_times_no_wrong_product(load, monkeypatch):
    case = load("gpu_models").cases(torch.device("cpu"), smoke=True)["gpt"]()
    gpu = load("gpu")
    product = gpu.kept(case)
    monkeypatch.setitem(gpu.WAYS, "kept", ("kept", lambda case, smoke: lambda vector: 1.3 * product(vector)))
    assert gpu.measure(case, "kept", smoke=True, rounds=1) == {"failure": "wrong: 3e-01 off"}


@pytest.mark.parametrize("ways", ["hessian_ways", "gauss_newton_ways"])
def test_product_ways_agree(load, ways):
    products = load("products")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    rows = products.measure(model, torch.randn(4, 6), torch.arange(4) % 3, 1, getattr(products, ways))
    assert len(rows) >= 4
    assert all(float(difference) < 1e-4 for *_, difference in rows[1:])


# -- what they count and compute --------------------------------------------------------------------------


def test_exact_trace_is_the_trace(load):
    torch.manual_seed(0)
    problem = load("problem").Problem
    model = SimpleCNN(3, 4, width=2).double()
    batches = [(torch.randn(count, 3, 8, 8).double(), torch.arange(count) % 4) for count in (5, 3)]
    made = problem(model, nn.CrossEntropyLoss(), batches, {})
    true = float(Hessian(made.risk()).to_dense().trace())
    assert load("reference").exact_trace(made) == pytest.approx(true, rel=1e-9)


def test_density_error_of_known_distributions(load):
    error = load("reference").density_error
    true = (np.array([0.0, 2.0]), np.array([0.5, 0.5]))
    assert error(true, true) == 0
    assert error((np.array([0.0]), np.array([1.0])), true) == pytest.approx(1)
    assert error((np.array([0.5, 2.0]), np.array([0.5, 0.5])), true) == pytest.approx(0.25)


def test_worst_error_pairs_by_magnitude(load):
    error = load("peer_methods").worst_error
    assert error([-3.0, 1.0, 2.0], [2.0, -3.0, 1.0]) == 0
    assert error([-3.0, 1.1, 2.0], [1.0, 2.0, -3.0]) == pytest.approx(0.1)


def test_slope_with_its_standard_error(load):
    slope, sizes = load("scaling").slope, [1, 10, 100, 1000]
    assert slope(sizes, [3 * size**1.5 for size in sizes]) == "1.50 ± 0.00"
    # Residuals ±ε alternate; by hand: slope −0.4ε and standard error ε·√(3.2/2/5) per unit of log size.
    noisy = [np.exp(0.1 * (-1) ** i) for i in range(4)]
    assert slope(np.exp(range(4)), noisy) == "-0.04 ± 0.06"
    assert slope(sizes[:2], sizes[:2]) == "–"


def test_networks_have_the_size_asked_for(load):
    scaling, overhead = load("scaling"), load("overhead")
    made = [(scaling.network, 50_000_000), (scaling.network, 10_000), (overhead.mlp, 10**7), (overhead.cnn, 10**7)]
    for make, size in made:
        with torch.device("meta"):
            assert sum(p.numel() for p in make(size).parameters()) == pytest.approx(size, rel=0.02)


def test_gpu_networks_are_the_published_ones(load):
    make, stem = load("gpu_models").resnet, 64 * 3 * (49 - 9)  # theirs is 7×7
    published = [([2, 2, 2, 2], False, 512, 11_689_512), ([3, 4, 6, 3], True, 2048, 25_557_032)]
    for depths, bottleneck, channels, size in published:
        with torch.device("meta"):
            network = make(depths, bottleneck=bottleneck, classes=1000)
            assert sum(p.numel() for p in network.parameters()) + stem == size
            assert network[:-3](torch.empty(1, 3, 32, 32)).shape == (1, channels, 4, 4)


def test_counted_counts_vectors(load, monkeypatch):
    module = load("fresh_process")
    monkeypatch.setattr(Hessian, "_matmat", Hessian._matmat)  # comes back at the end
    count = module.counted("losslab.operators.hessian:Hessian._matmat", lambda matrix: matrix.shape[1])
    made = load("problem").Problem(nn.Linear(2, 1), nn.MSELoss(), [(torch.ones(2, 2), torch.ones(2, 1))], {})
    hessian = Hessian(made.risk())
    hessian.matmat(torch.ones(3, 4))
    hessian @ torch.ones(3)
    assert count == [5]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print('noise'); print('{\"a\": 1}')", None),
        ("import no_such_package", "not installed (pip install 'losslab[bench]'): No module named 'no_such_package'"),
        ("raise ValueError('why')", "ValueError: why"),
        ("import os; os.abort()", "ended by signal 6"),
        ("import time; time.sleep(60)", "no answer within 1 s"),
    ],
)
def test_a_fresh_process_answers_or_says_why_not(load, tmp_path, code, said):
    script = tmp_path / "script.py"
    script.write_text(code)
    result = load("fresh_process").in_a_fresh_process(str(script), [], timeout=1 if "sleep" in code else 60)
    assert result == ({"failure": said} if said else {"a": 1})


def test_every_other_round_goes_backwards(load):
    order = []
    rounds = load("fresh_process").in_rounds(lambda name, seed: order.append((name, seed)) or {}, ["a", "b"], 2)
    assert order == [("a", 0), ("b", 0), ("b", 1), ("a", 1)]
    assert [list(found) for found in rounds] == [["a", "b"], ["a", "b"]]


def test_results_name_their_machine():
    for path in (FOLDER / "results").glob("*.md"):
        if path.name not in ("gpu.md", "scaling_model.md"):  # not run; arithmetic
            assert "- machine: " in path.read_text(), path.name


def test_points_survive_json(load):
    assert json.loads(json.dumps(load("scaling").series(True)))


def test_example_gradients(printed):
    out = printed("example_gradients", "--examples=8", "--kernel-examples=4", "--rounds=1", "--only=LeNet")
    assert "| LeNet-5 |" in out


def test_scaling_model(printed):
    out = printed("scaling_model")
    assert re.search(r"\| 70 B \| 1024 \| 280\.00 .*no: vectors", out)
    assert re.search(r"\| 70 B, FSDP \| 1024 .*yes", out)


def test_landscape_plane(printed, load, monkeypatch):
    script = load("landscape_plane")
    chosen = ("CNN with BatchNorm on 1×8×8", "MLP 784-200-200-10")
    monkeypatch.setattr(script, "CASES", {name: script.CASES[name] for name in chosen})
    monkeypatch.setattr(script, "random_plane", None)
    text = printed("landscape", "--section=plane", "--resolution=3", "--rounds=1", "--share=0.004")
    cells = row(text, "CNN with BatchNorm on 1×8×8, 2 examples")
    assert float(cells[1]) >= 0
    assert cells[4:6] == ["≤ 1.1", "not installed"]
    assert float(cells[7]) < 1e-5
    assert row(text, "MLP 784-200-200-10, 8 examples")[4] == "≤ 0.4"


def test_landscape_fastfood(load):
    text = "\n".join(load("landscape_fastfood").fastfood(2000, (5,), rounds=1, repeats=1))
    for kind in ("fastfood", "dense", "sparse"):
        assert f"| 5 | {kind} |" in text


def test_landscape_band(load, monkeypatch):
    script = load("landscape_band")
    cases = {"MLP": ((6,), (6, 5, 10), 4, 3), "CNN": ((3, 4, 4), None, 2, 3)}
    monkeypatch.setattr(script, "CASES", cases)
    lines = script.band(rounds=1, steps=2)
    for name in cases:
        (row,) = [line for line in lines if line.startswith(f"| {name} |")]
        assert float(row.split("|")[-2]) < 1e-3  # both sides move the pivots alike


# -- the optimizer study ----------------------------------------------------------------------------------


@pytest.fixture
def small_digits(load, monkeypatch):
    """The first of the digits instead of all."""
    data = load("optimizer_data")
    small = data.Data(*((x[:80], y[:80]) for x, y in data.digits(None)))
    tasks = load("optimizer_tasks").TASKS
    monkeypatch.setitem(tasks, "digits", replace(tasks["digits"], data=lambda _: small, batch_size=16))
    return small


@pytest.fixture
def study(load, tmp_path, monkeypatch):
    """A study in which a run's loss is a formula, c / steps, and the runs that were done."""
    cache, module, tasks = load("optimizer_cache"), load("optimizer_study"), load("optimizer_tasks")
    done = []

    def formula(run, data):
        done.append(run)
        speed, best = {"momentum": (1, 30.0), "adamw": (2, 1e-3), "talt": (8, 1e-2)}[run.optimizer]
        off = abs(np.log10(run.settings["lr"] / best))
        return {"loss": (1 + 0.01 * off) * (1 + 0.01 * (run.seed % 10)) / (speed * run.horizon)}

    monkeypatch.setattr(cache, "train", formula)
    return module.Study(tasks.TASKS["digits"], cache.Runs(tmp_path, None), module.Protocol(seeds=5)), done


def test_horizons_find_the_ratio_of_speeds(study):
    made, done = study
    target, best = made.target()
    assert best == "adamw"
    arrivals = {name: made.arrivals(name, target) for name in ("momentum", "adamw", "talt")}
    assert arrivals["adamw"][2] == pytest.approx(200)  # the median seed's own loss at T is the target
    assert (np.diff(arrivals["adamw"]) > 0).all()  # later seeds are slower, by one in a hundred
    assert np.allclose(arrivals["talt"] / arrivals["adamw"], 1 / 4, rtol=0.05)  # but for interpolation by the logarithm
    assert np.allclose(arrivals["momentum"][:2], 400, rtol=0.05)
    assert np.isinf(arrivals["momentum"][2:]).all()  # 2T is the longest
    count = len(done)
    assert (made.arrivals("talt", target) == arrivals["talt"]).all()
    assert len(done) == count  # from the cache
    assert np.isinf(made.arrivals("adamw", target / 10)).all()
    assert (made.arrivals("talt", 10 * target) == made.protocol.horizon(made.task, -6)).all()


def test_tuning_goes_on_where_the_best_is_at_an_edge(study):
    made, done = study
    inside, outside = made.tuned("adamw"), made.tuned("momentum")
    assert len(inside.trials) == 16
    assert inside.settings["lr"] == pytest.approx(1e-3, rel=0.4)
    assert inside.loss == pytest.approx(1.01 / 400, rel=0.01)  # the mean of seeds 0, 1, 2
    first, second, *_ = sorted(loss for _, loss in inside.trials)
    assert (inside.loss, inside.next_best) == pytest.approx((1.02 * first, 1.02 * second))  # all seeds over the first
    assert inside.next_best > inside.loss
    assert len(outside.trials) == 16 + 2 * 4
    assert (outside.low, outside.high) == (1e-3, 100.0)
    assert 10 < outside.settings["lr"] < 100
    assert sum(run.optimizer == "adamw" for run in done) == 16 + 3 * 4
    quarters = [int(4 * np.log10(settings["lr"] / 3e-5) / 3) for settings, _ in inside.trials]
    assert sorted(quarters) == sorted(4 * [0, 1, 2, 3])


def test_nothing_is_started_for_a_report(study, load, tmp_path):
    made, done = study
    cache = load("optimizer_cache")
    reading = replace(made, runs=cache.Runs(tmp_path, None, start=False))
    with pytest.raises(cache.Missing, match="16 of 16 runs of adamw at 200 steps"):
        reading.tuned("adamw")
    assert not done
    assert made.tuned("adamw") == reading.tuned("adamw")  # what is there is read


@pytest.mark.parametrize(
    ("interval", "said"),
    [
        ((0.3, 0.2, 0.45), "at least 2.2× faster"),
        ((0.95, 0.93, 0.97), "faster"),
        ((0.9, 0.8, 1.1), "no significant difference"),
        ((2.0, 1.5, 3.0), "slower"),
        ((np.inf, 1.2, np.inf), "slower"),
        ((0.0, 0.0, 0.0), "arrives where the other never does"),
        ((np.nan, 0.0, np.inf), "no significant difference"),
    ],
)
def test_no_claim_is_more_than_its_interval(load, interval, said):
    module = load("optimizer_study")
    assert module.claim(module.Estimate(*interval)) == said


def test_a_run_is_its_seed(load, small_digits):
    runs = load("optimizer_runs")
    made = [runs.train(runs.Run("digits", "talt", {"lr": 0.01}, seed, 3), small_digits) for seed in (0, 0, 1, 100)]
    assert made[0]["loss"] == made[1]["loss"] != made[2]["loss"]
    assert ["test_loss" in record for record in made] == [False, False, False, True]
    assert made[0]["steps"] == 3
    lost = runs.train(runs.Run("digits", "momentum", {"lr": 1e20}, 0, 9), small_digits)
    assert (lost["diverged"], lost["loss"]) == (True, np.inf)
    assert lost["steps"] < 9


def test_every_optimizer_of_the_study_trains(load, small_digits):
    pytest.importorskip("pytorch_optimizer")
    runs, module = load("optimizer_runs"), load("optimizer_study")
    for name in module.OPTIMIZERS:
        (settings,) = module.draw(module.space_of(name), 1, seed=0)
        record = runs.train(runs.Run("digits", name, settings, 0, 2), small_digits)
        assert np.isfinite(record["loss"]), name
        assert record["state_numbers"] >= record["parameters"] * (0.9 if name != "shampoo" else 0)


def test_a_key_is_all_that_decides(load, monkeypatch):
    runs = load("optimizer_runs")
    base = {"task": "digits", "optimizer": "talt", "settings": {"lr": 0.1}, "seed": 0, "horizon": 5}
    changes = [{}, {"settings": {"lr": 0.2}}, {"seed": 1}, {"horizon": 6}, {"batch_size": 8}, {"scale": 2.0}]
    keys = [runs.Run(**{**base, **change}).key for change in changes]
    monkeypatch.setattr(runs, "TALT_VERSION", "another")
    keys += [runs.Run(**base).key, runs.Run(**{**base, "optimizer": "adamw"}).key]
    assert len(set(keys)) == len(keys)


def test_every_task_makes_a_network_that_its_optimizers_take(load):
    tasks, runs = load("optimizer_tasks"), load("optimizer_runs")
    shapes = {"digits": (1, 8, 8), "autoencoder": (196,), "sst2": (24,), "characters": (64,)}
    for name, task in tasks.TASKS.items():
        shape = (2, *shapes.get(name, (3, 16, 16)))
        text = name in ("sst2", "characters")
        x = torch.randint(1, 90, shape) if text else torch.rand(shape)
        model = task.model()
        y = torch.zeros(2, dtype=torch.long) if task.classes and name != "characters" else x
        task.loss(model(x), y).backward()
        optimizer = runs.make_optimizer("talt", {"lr": 0.1}, model)
        assert [group["structure"] for group in optimizer.param_groups] == ["auto", "diagonal"], name
        optimizer.step()
    split = runs.make_optimizer("talt", {"lr": 0.1, "structures": {"Conv2d": "polar"}, "exclude": []}, model)
    axes = {group["structure"]: {p.ndim for p in group["params"]} for group in split.param_groups}
    assert axes == {"auto": {2}, "diagonal": {1}, "polar": {4}}


def test_optimizers(printed, load, tmp_path, monkeypatch, small_digits):
    ablation = load("optimizer_ablation")
    monkeypatch.setattr(ablation, "BATCHES", (8,))
    monkeypatch.setattr(ablation, "FARTHEST", 1)
    monkeypatch.setattr(ablation, "SCALES", (1.0,))
    monkeypatch.setattr(ablation, "STRIDES", range(2))
    file = tmp_path / "results" / "page.md"
    stages = ["tune", "final", "horizons", "time", "rival", "report", "ablation", "sensitivity"]
    small = ["--trials=2", "--seeds=2", "--length=0.02", "--rounds=1", f"--cache={tmp_path}", f"--output={file}"]
    several = ["--optimizers", "momentum", "adamw", "talt", "--variants", "default", "v1", "--tasks", "digits", "sst2"]
    text = printed("optimizers", *small, *several, "--stages", *stages)
    assert "Missing" not in text
    assert "Not run: sst2, no SST-2/train.tsv and no SST-2/dev.tsv in --data None." in text
    assert len(row(file.read_text(), "talt |")) == len(load("optimizer_report").HEAD)
    assert row(text, "default |")[3] == "+0 [+0, +0]"
    archive, elsewhere = load("optimizer_archive"), tmp_path / "elsewhere"
    assert archive.unpack(file.with_name("page_runs.jsonl.xz"), elsewhere) > 20
    again = printed("optimizers", *small[:-2], f"--cache={elsewhere}", *several, "--stages", "report")
    assert again.partition("## ")[2].strip() in text
    assert "First weights × 1:" in file.with_name("page_sensitivity.md").read_text()


def test_a_rival_that_was_never_tuned_does_not_hide_the_best_one(load):
    report = load("optimizer_report")
    known = report.Contender("adamw", tuned=object(), arrivals=np.array([3.0]))
    found = report.Findings(study=None, contenders={"adamw": known, "muon": report.Contender("muon")})
    assert found.best_rival() == "adamw"
    found.contenders["muon"].tuned = object()  # but has not arrived anywhere yet
    assert found.best_rival() is None
