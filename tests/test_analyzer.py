"""The analyzer answers with losslab's own functions, under the names that its users know; the seed's snippets run."""

import numpy as np
import pandas
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import loss_landscape_analysis
import losslab
from cases import classes, mlp, normal, seeded
from losslab.analyzer import LandscapeMetrics, LossLandscapeAnalyzer, compare_architectures
from losslab.analyzer.metrics import BARRIER, CONDITION, NEGATIVE, SHARPNESS
from losslab.status import Status
from losslab.studies.architectures import DeepNet, DenseNet, ResNetWithSkips, ShallowNet
from untouched import assert_untouched

TRAIN = [(normal(6, 4), classes(6)), (normal(3, 4, seed=5), classes(3, seed=6))]
TEST = [(normal(5, 4, seed=8), classes(5, seed=9))]


def analyzer(model: nn.Module | None = None, **options) -> LossLandscapeAnalyzer:
    return LossLandscapeAnalyzer(model or mlp().double(), TRAIN, TEST, nn.CrossEntropyLoss(), **options)


def test_full_analysis_is_what_the_probes_say():
    model = mlp().double()
    metrics = analyzer(model).full_analysis(num_eigenvalues=4)
    dense = losslab.Hessian(losslab.EmpiricalRisk(model, nn.CrossEntropyLoss(), TRAIN)).to_dense()
    values = torch.linalg.eigvalsh(dense).numpy()
    np.testing.assert_allclose(metrics.top_eigenvalues, values[::-1][:4], rtol=1e-6)
    np.testing.assert_allclose(metrics.smallest_eigenvalues, values[:4], atol=1e-8)
    assert metrics.trace == pytest.approx(values.sum(), rel=1e-6)
    assert metrics.condition_number == pytest.approx(abs(values[-1] / values[0]), rel=1e-4)
    assert metrics.spectral_gap == pytest.approx(values[-1] - values[-2], rel=1e-4)
    assert metrics.num_negative_eigenvalues == (values < -1e-12 * values[-1]).sum()
    risk = losslab.EmpiricalRisk(model, nn.CrossEntropyLoss(), TRAIN)
    assert metrics.sharpness == losslab.sharpness(risk).value
    assert metrics.flatness == 1 / (1 + metrics.sharpness)
    assert metrics.train_loss == pytest.approx(risk.loss())
    x, y = TEST[0]
    assert metrics.test_loss == pytest.approx(float(nn.functional.cross_entropy(model(x), y).detach()))
    assert metrics.test_accuracy == pytest.approx(float((model(x).argmax(1) == y).double().mean()))
    assert metrics.generalization_gap == metrics.test_loss - metrics.train_loss
    assert metrics.num_examples == 9


def test_no_test_data_no_gap():
    metrics = LossLandscapeAnalyzer(mlp().double(), TRAIN, None, nn.CrossEntropyLoss()).full_analysis(2)
    assert np.isnan([metrics.test_loss, metrics.generalization_gap, metrics.test_accuracy]).all()


def test_more_eigenvalues_than_there_are_is_no_error():
    found = analyzer(nn.Linear(4, 3).double()).compute_hessian_metrics(num_eigenvalues=20)
    assert len(found["top_eigenvalues"]) == 7
    with pytest.raises(ValueError, match="k: expected 1 <= k"):
        analyzer().compute_hessian_metrics(num_eigenvalues=0)


def test_mode_connectivity_names():
    first, second = mlp().double(), seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))).double()
    with torch.no_grad():
        for p in second.parameters():
            p.neg_()
    found = analyzer(first).compute_mode_connectivity(second, num_points=5)
    assert len(found["alphas"]) == len(found["losses"]) == 5
    assert found["barrier_height"] == max(found["losses"]) - max(found["loss_start"], found["loss_end"])
    assert found["connectivity_score"] == 1 / (1 + found["barrier_height"])
    apart = torch.cat([(p - q).flatten() for p, q in zip(first.parameters(), second.parameters(), strict=True)])
    assert found["path_norm"] == pytest.approx(float(apart.norm().detach()))
    with pytest.raises(ValueError, match="num_points: expected at least the 2 ends, got 1"):
        analyzer(first).compute_mode_connectivity(second, num_points=1)


def test_landscape_contains_the_centre_also_where_the_resolution_is_even(tmp_path):
    path = tmp_path / "landscape.png"
    found = analyzer().visualize_2d_landscape(distance=0.5, resolution=4, save_path=path)
    assert found.losses.shape == (5, 5)
    assert found.losses[2, 2] == pytest.approx(analyzer().risk.loss())
    assert path.read_bytes().startswith(b"\x89PNG")


def test_trajectory_of_a_training():
    model, twin = mlp().double(), mlp().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    found = analyzer(model).analyze_optimization_trajectory(optimizer, num_steps=13, track_interval=2)
    assert found["steps"].tolist() == [0, 2, 4, 6, 8, 10, 12, 13]
    assert len(found["sharpness"]) == len(found["steps"][::5]) == 2
    lengths = {name: len(found[name]) for name in ("losses_train", "losses_test", "grad_norms", "lambda_max", "bounds")}
    assert set(lengths.values()) == {8}
    np.testing.assert_allclose(found["bounds"], 2 * (1 + 0.9) / 0.1)
    # The same steps by hand.
    by_hand = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for step in range(13):
        x, y = TRAIN[step % 2]
        by_hand.zero_grad()
        nn.functional.cross_entropy(twin(x), y).backward()
        by_hand.step()
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()))
    risk = losslab.EmpiricalRisk(twin, nn.CrossEntropyLoss(), TRAIN)
    assert found["losses_train"][-1] == pytest.approx(risk.loss())
    assert found["grad_norms"][-1] == pytest.approx(float(risk.gradient().norm()))


def test_an_optimizer_of_another_model_is_refused():
    """Of a copy, say: nothing would move, and nothing would say so."""
    optimizer = torch.optim.SGD(mlp().double().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizer: expected one of this model's parameters"):
        analyzer().analyze_optimization_trajectory(optimizer, num_steps=2)


def test_flatness_at_a_maximum():
    """L = −10⁶|w − 1|²: every point nearby lies far below, where 1/(1 + value) would be negative."""

    class Hill(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(2, dtype=torch.float64))

        def forward(self, x):
            return -1e6 * (self.w - 1).square().sum() * x

    data = [(torch.ones(1, 1, dtype=torch.float64), classes(1))]
    metrics = LossLandscapeAnalyzer(Hill(), data, None, lambda f, _: f.mean()).full_analysis(num_eigenvalues=1)
    assert metrics.sharpness < -1
    assert metrics.flatness == 1.0


def test_trajectory_leaves_the_mode_and_refuses_nonsense():
    model = mlp().double().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    analyzer(model).analyze_optimization_trajectory(optimizer, num_steps=1, track_interval=1)
    assert not any(module.training for module in model.modules())
    with pytest.raises(ValueError, match="track_interval: expected a number >= 1, got 0"):
        analyzer(model).analyze_optimization_trajectory(optimizer, num_steps=1, track_interval=0)


def test_the_model_stays_as_it_was():
    model = mlp().double()
    with assert_untouched(model):
        made = analyzer(model, device="cpu")
        made.full_analysis(2)
        made.compute_mode_connectivity(model, num_points=3)
        made.visualize_2d_landscape(resolution=3)


def test_a_copy_elsewhere_follows_the_model():
    """On another device the risk's model is a copy: weights trained in between must reach it."""
    model = mlp().double()
    made = analyzer(model)
    made.device = torch.device("meta")
    made._moved = lambda risk: risk.to(torch.float64)  # a copy, as for another device
    before = made.compute_sharpness()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    after = made.compute_sharpness()
    assert after != before
    assert after == pytest.approx(analyzer(model).compute_sharpness())


def test_scales_in_words():
    assert [CONDITION.word(x).split(":")[0] for x in (99, 100, 1000, 1001)] == [
        "excellent",
        "good",
        "challenging",
        "challenging",
    ]
    assert [SHARPNESS.word(x).split(":")[0] for x in (0.09, 0.1, 1.1)] == ["flat minimum", "moderate", "sharp minimum"]
    assert [BARRIER.word(x).split(":")[0] for x in (0.05, 0.5, 1.5)] == [
        "highly connected",
        "moderately connected",
        "disconnected on the straight line",
    ]
    assert [NEGATIVE.word(x) for x in (0, 5, 6)] == [NEGATIVE.words[0], NEGATIVE.words[0], NEGATIVE.words[1]]
    assert CONDITION.word(float("nan")) == "not known"


def test_interpretation_names_numbers_caveats_and_doubt():
    made = analyzer()
    metrics = made.full_analysis(2)
    text = metrics.interpret({"barrier_height": 0.5})
    assert f"condition number {metrics.condition_number:.3g}" in text
    assert "moderately connected" in text
    assert "Dinh et al. 2017" in text
    assert "Not all of it is certain" not in metrics.interpret()
    values = vars(metrics) | {"status": Status.budget_reached}
    assert "Not all of it is certain: the budget" in LandscapeMetrics(**values).interpret()


def test_architectures_side_by_side():
    models = {"one": mlp().double(), "two": mlp().double()}
    frame = compare_architectures(models, TRAIN, TEST, nn.CrossEntropyLoss())
    assert list(frame.index) == ["one", "two"]
    assert frame.loc["one", "Condition Number"] == frame.loc["two", "Condition Number"]
    assert frame.loc["one", "Status"] == "converged"
    assert "| one" in frame.to_markdown()


def test_the_other_import_is_the_same():
    assert loss_landscape_analysis.LossLandscapeAnalyzer is LossLandscapeAnalyzer
    assert losslab.LossLandscapeAnalyzer is LossLandscapeAnalyzer


def test_quick_start(tmp_path):
    """The founding document's minimal example, with fewer examples."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 20, generator=generator)
    y = (x[:, 0] + x[:, 1] > 0).long()
    train_loader = DataLoader(TensorDataset(x, y), batch_size=32)
    model = seeded(lambda: nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2)))
    optimizer = torch.optim.Adam(model.parameters())
    criterion = nn.CrossEntropyLoss()
    for _ in range(10):
        for inputs, targets in train_loader:
            optimizer.zero_grad()
            criterion(model(inputs), targets).backward()
            optimizer.step()
    made = loss_landscape_analysis.LossLandscapeAnalyzer(model, train_loader, train_loader, criterion)
    metrics = made.full_analysis()
    for line in (
        f"Condition Number: {metrics.condition_number:.2f}",
        f"Sharpness: {metrics.sharpness:.4f}",
        f"Flatness: {metrics.flatness:.4f}",
    ):
        assert "nan" not in line
    made.visualize_2d_landscape(resolution=5, save_path=tmp_path / "my_landscape.png")
    assert (tmp_path / "my_landscape.png").is_file()


def test_architecture_snippet():
    """The founding document's comparison of four networks, its table included."""
    images = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(images, torch.arange(12) % 10), batch_size=6)
    nets = {"Shallow": ShallowNet, "Deep": DeepNet, "ResNet": ResNetWithSkips, "DenseNet": DenseNet}
    results = {}
    for name, net in nets.items():
        model = seeded(lambda net=net: net(width=4))
        made = loss_landscape_analysis.LossLandscapeAnalyzer(model, loader, loader, nn.CrossEntropyLoss())
        results[name] = made.full_analysis(num_eigenvalues=2)
    frame = pandas.DataFrame(
        {
            name: {
                "Condition Number": metrics.condition_number,
                "Sharpness": metrics.sharpness,
                "Flatness": metrics.flatness,
                "Spectral Gap": metrics.spectral_gap,
                "Negative Eigenvalues": metrics.num_negative_eigenvalues,
            }
            for name, metrics in results.items()
        }
    ).T
    assert frame.notna().all().all()
    assert len(frame.to_markdown().splitlines()) == 6


def test_trajectory_and_connectivity_snippets():
    """The founding document's plots and prints: what they index and format is there."""
    made = analyzer()
    optimizer = torch.optim.SGD(made.model.parameters(), lr=0.01, momentum=0.9)
    found = made.analyze_optimization_trajectory(optimizer=optimizer, num_steps=12, track_interval=2)
    axes = Figure().subplots(1, 3)
    axes[0].plot(found["steps"], found["losses_train"], label="Train")
    axes[0].plot(found["steps"], found["losses_test"], label="Test")
    axes[1].plot(found["steps"], found["grad_norms"])
    axes[2].plot(found["steps"][::5], found["sharpness"])
    connectivity = made.compute_mode_connectivity(mlp().double(), num_points=5)
    for key in ("barrier_height", "connectivity_score", "path_norm"):
        assert np.isfinite(float(f"{connectivity[key]:.4f}"))
