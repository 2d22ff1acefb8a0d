"""Feature maps and attention maps: what the layers compute, no trace left, and records that come back."""

import copy
import math
import shutil

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from typer.testing import CliRunner

from losslab import cli
from losslab.records import from_record
from losslab.report import charts as figures
from losslab.report import matplotlib_backend, page
from losslab.report.contents import read
from losslab.report.images import GAP, centres, mosaic
from losslab.status import Status
from losslab.studies import checkpoint
from losslab.studies.attention import AttentionMaps, attention_maps
from losslab.studies.config import make_config
from losslab.studies.feature_maps import FeatureMaps, feature_maps
from losslab.studies.models.bert import transformers
from losslab.studies.pictures import Selection, _texts, show_attention, show_features
from losslab.studies.record import RunFolder
from losslab.studies.runs import load_run
from losslab.studies.train import train
from untouched import assert_untouched

TOKENS, WIDTH, HEADS = 5, 8, 2


class Net(nn.Module):
    """A user's own: two convolutions, one of them called twice, noise, a counter in a buffer, and a fragile end."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.again = nn.Conv2d(4, 4, 3, stride=2)
        self.unused = nn.Conv2d(1, 1, 1)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.breaks = False

    def forward(self, images):
        self.calls += 1
        once = torch.relu(self.stem(images))
        twice = torch.relu(self.again(torch.relu(self.again(once))))
        if self.breaks:
            raise RuntimeError("broken")
        return self.head(self.dropout(twice).mean((2, 3))) + torch.rand(())


class Texts(nn.Module):
    """A classifier of token ids; 0 is padding. The encoder's layers take torch's fast path in eval mode."""

    def __init__(self, layers=2):
        super().__init__()
        self.embedding = nn.Embedding(9, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, dropout=0.3, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, ids):
        padding = ids == 0
        return self.head(self.encoder(self.embedding(ids), src_key_padding_mask=padding)[:, 0])


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def texts():
    torch.manual_seed(1)
    return Texts()


def images(count=3, seed=2):
    return torch.randn(count, 2, 9, 7, generator=torch.Generator().manual_seed(seed))


def ids():
    return torch.tensor([[3, 1, 4, 1, 5], [2, 7, 1, 0, 0]])


def test_feature_maps_are_the_convolutions_outputs(net):
    maps = feature_maps(net, images(), channels=3)
    net.eval()
    first = net.stem[0](images())
    second = net.again(torch.relu(net.stem[1](first)))
    expected = {"stem.0": first, "again": second, "again:2": net.again(torch.relu(second))}
    assert maps.layers == tuple(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(maps[name], value.detach()[:, :3].numpy())
    assert maps.shapes == ((4, 9, 7), (4, 4, 3), (4, 1, 1))
    assert maps.channels == ((0, 1, 2),) * 3
    np.testing.assert_array_equal(maps.inputs, images().mean(1).numpy())
    assert maps.status is Status.complete
    assert maps.source is None


def test_chosen_layers_and_channels(net):
    maps = feature_maps(net, images(), layers=["stem.*"], channels=[3, 0])
    whole = feature_maps(net, images(), channels=99)
    assert maps.layers == ("stem.0",)
    np.testing.assert_array_equal(maps["stem.0"], whole["stem.0"][:, [3, 0]])
    assert whole["stem.0"].shape[1] == 4


def test_not_finite_is_said(net):
    with torch.no_grad():
        net.again.weight[0, 0, 0, 0] = torch.nan
    assert feature_maps(net, images(), layers="stem.*").status is Status.complete
    assert feature_maps(net, images()).status is Status.nonfinite


@pytest.mark.parametrize("look", [feature_maps, attention_maps])
@pytest.mark.parametrize("breaks", [False, True])
def test_nothing_is_touched_even_where_the_forward_pass_fails(net, texts, look, breaks):
    """Modes, buffers, gradients, hooks, random states, and torch's switch for its fast path."""
    if look is feature_maps:
        model, inputs, net.breaks = net, images(), breaks
    else:
        model, inputs = texts, torch.tensor([[3, 99]]) if breaks else ids()
    model.train()
    with assert_untouched(model):
        if breaks:
            with pytest.raises((RuntimeError, IndexError)):
                look(model, inputs)
        else:
            look(model, inputs)
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_same_pictures_again(net):
    """A network that draws random numbers in eval mode draws the same."""

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 1, 1)

        def forward(self, x):
            return self.conv(x + torch.randn_like(x))

    model = Noisy()
    first = feature_maps(model, images())
    torch.rand(1)
    np.testing.assert_array_equal(first["conv"], feature_maps(model, images())["conv"])


def attended(module, x, weights):
    """What the layer puts out if these are its weights."""
    value = functional.linear(x, module.in_proj_weight[2 * WIDTH :], module.in_proj_bias[2 * WIDTH :])
    heads = value.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    return module.out_proj((torch.from_numpy(weights) @ heads).transpose(1, 2).flatten(2))


def test_attention_weights_give_the_layers_output(texts):
    """softmax(QKᵀ/√d) by hand, through V and the output projection, is what the encoder computes by its own paths."""
    maps = attention_maps(texts, ids())
    assert maps.layers == ("encoder.layers.0.self_attn", "encoder.layers.1.self_attn")
    texts.eval()
    x, padding = texts.embedding(ids()), ids() == 0
    for name, layer in zip(maps.layers, texts.encoder.layers, strict=True):
        module = layer.self_attn
        query, key = functional.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)[:2]
        query, key = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (query, key))
        scores = query @ key.mT / math.sqrt(WIDTH / HEADS)
        by_hand = scores.masked_fill(padding[:, None, None], -math.inf).softmax(-1).detach().numpy()
        np.testing.assert_allclose(maps[name], by_hand, atol=1e-6)
        np.testing.assert_allclose(maps[name].sum(-1), 1, atol=1e-6)
        assert (maps[name][1, :, :, 3:] == 0).all()
        out = attended(module, x, maps[name])
        plain = module(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        torch.testing.assert_close(out, plain, atol=1e-6, rtol=0)
        x = layer(x, src_key_padding_mask=padding)
    # The whole network's own output, by the fast path where torch takes it.
    with torch.inference_mode():
        torch.testing.assert_close(texts(ids()), texts.head(x[:, 0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("needed", "averaged"), [(False, True), (True, True), (True, False)])
def test_a_caller_of_attention_gets_what_it_asked_for(needed, averaged):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
            self.seen = []

        def forward(self, x):
            values, weights = self.attention(x, x, x, None, needed, average_attn_weights=averaged)
            self.seen.append(weights)
            return values

    model = Own().eval()
    x = torch.randn(2, TOKENS, WIDTH)
    with torch.no_grad():
        model(x)
    maps = attention_maps(model, x)
    direct, inside = model.seen
    assert (direct is None) == (inside is None) == (not needed)
    if needed:
        torch.testing.assert_close(inside, direct, atol=1e-6, rtol=0)
    assert maps["attention"].shape == (2, HEADS, TOKENS, TOKENS)


@pytest.fixture(scope="module")
def bert():
    library = transformers()
    config = library.BertConfig(
        vocab_size=9, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=16
    )
    torch.manual_seed(3)
    return library.BertForSequenceClassification(config)


def test_attention_of_a_model_of_transformers(bert):
    """It computes with a kernel that forms no weights, and does so again afterwards."""
    inputs = {"input_ids": ids(), "attention_mask": (ids() != 0).long()}
    assert bert.config._attn_implementation == "sdpa"
    bert.train()
    with assert_untouched(bert):
        maps = attention_maps(bert, inputs)
    assert bert.config._attn_implementation == "sdpa"
    asked = copy.deepcopy(bert).eval()
    asked.set_attn_implementation("eager")
    expected = asked(**inputs, output_attentions=True).attentions
    assert maps.layers == tuple(f"bert.encoder.layer.{layer}.attention.self" for layer in range(2))
    for name, weights in zip(maps.layers, expected, strict=True):
        np.testing.assert_allclose(maps[name], weights.detach().numpy(), atol=1e-6)
        np.testing.assert_allclose(maps[name].sum(-1), 1, atol=1e-5)
        assert (maps[name][1, :, :, 3:] == 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net, texts: feature_maps(nn.Linear(2, 2), torch.zeros(1, 2)), "model: expected Conv2d, got a model"),
        (lambda net, texts: attention_maps(net, images()), "model: expected attention layer, got a model without any"),
        (lambda net, texts: feature_maps(net, images(), layers="stem.1"), "'stem.1' matches no Conv2d; did you mean"),
        (lambda net, texts: attention_maps(texts, ids(), layers=["encoder.*", "x"]), "'x' matches no attention layer"),
        (lambda net, texts: feature_maps(net, images(), layers="unused"), "unused took no part in the forward pass"),
        (lambda net, texts: feature_maps(net, images(), layers=[]), "layers: expected a pattern, got none"),
        (lambda net, texts: feature_maps(net, images(), channels=0), "channels: expected a number >= 1 or a list"),
        (lambda net, texts: feature_maps(net, images(), channels=[]), "channels: expected a number >= 1 or a list"),
        (lambda net, texts: feature_maps(net, images(), layers="stem.*", channels=[4]), "channels 0 to 3, got 4"),
    ],
)
def test_bad_input_is_one_line(net, texts, call, message):
    with pytest.raises(ValueError, match=r"\A.*\Z") as error:
        call(net, texts)
    assert message in str(error.value)


def small_run(path, model, **dataset):
    """A short training with snapshots at steps 0 and 2, the end at step 4."""
    values = {
        "dataset": {"train_examples": 64, "batch_size": 16, **dataset},
        "model": model,
        "optimizer": {"name": "sgd", "lr": 0.1},
        "training": {"epochs": 1, "device": "cpu", "snapshots": {"steps": [0, 2]}, "evaluate_test": False},
    }
    return train(make_config(values), RunFolder.create(path))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("pictures") / "cnn", {"name": "simple_cnn", "width": 2})


@pytest.fixture
def fresh(run, tmp_path):
    """The run without pictures."""
    shutil.copytree(run.path, tmp_path / "cnn", ignore=shutil.ignore_patterns("probes", "figures"))
    return RunFolder(tmp_path / "cnn")


def test_a_run_is_shown_at_its_checkpoints(fresh):
    found = show_features(fresh.path, Selection("test", [7, 2], ["step-*", "last", "best"]), layers="features.0")
    loaded = load_run(fresh.path)
    assert [(maps.source.checkpoint, maps.source.step) for maps in found][:2] == [("step-0", 0), ("step-2", 2)]
    assert found[-1].source.step == 4
    assert RunFolder(fresh.path).probes()["feature_maps"] == ["0", "2", "4"]
    split = loaded.dataset.test
    for maps in found:
        if maps.source.step < 4:
            place = checkpoint.snapshots(fresh).steps.index(maps.source.step)
            checkpoint.snapshots(fresh)[place].put_into(loaded.model)
        else:
            loaded = load_run(fresh.path)
        with torch.no_grad():
            expected = loaded.model.features[0](split.inputs[[7, 2]])
        np.testing.assert_allclose(maps["features.0"], expected.numpy(), atol=1e-6)
        assert maps.source.examples == (7, 2)
        assert maps.source.targets == tuple(split.targets[[7, 2]].tolist())
    assert not np.array_equal(found[0].maps[0], found[-1].maps[0])
    again = from_record(FeatureMaps, *RunFolder(fresh.path).read_record("feature_maps", "2"))
    assert again.layers == ("features.0",)
    np.testing.assert_array_equal(again.maps[0], found[1].maps[0])
    assert (again.source.checkpoint, again.status) == ("step-2", Status.complete)


@pytest.mark.parametrize(
    ("selection", "error", "message"),
    [
        (Selection(checkpoints=["lats"]), FileNotFoundError, "no checkpoint 'lats'; there: best, last, step-0, step-2"),
        (Selection("tset"), ValueError, "split: unknown split 'tset', did you mean 'test'"),
        (Selection(examples=[0, 359]), ValueError, "places in the validation split, 0 to 358, got 359"),
        (Selection(examples=[-1]), ValueError, "got -1"),
        (Selection(examples=[]), ValueError, "got none"),
    ],
)
def test_a_wrong_selection_writes_nothing(run, selection, error, message):
    with pytest.raises(error, match=r"\A.*\Z") as raised:
        show_attention(run.path, selection)
    assert message in str(raised.value)
    assert "attention_maps" not in RunFolder(run.path).probes()


def test_a_run_without_checkpoints_is_refused(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    folder.write_config(make_config({}).model_dump(mode="json"))
    with pytest.raises(FileNotFoundError, match="no checkpoint yet"):
        show_features(folder.path)


def test_texts_lose_their_padding_but_not_what_looks_like_it_inside():
    vocabulary = ["[PAD]", "a", "b"]
    rows = torch.tensor([[1, 2, 0, 0], [2, 0, 1, 0], [0, 0, 0, 0]])
    assert _texts(rows, vocabulary) == (("a", "b"), ("b", "[PAD]", "a"), ())
    assert _texts(rows, ()) == ()


def test_the_command_draws_and_the_page_shows(fresh):
    chosen = ["--layer", "features.[03]", "--examples", "1,4", "--channels", "1,0", "--checkpoint", "step-2"]
    result = CliRunner().invoke(cli.app, ["show", "features", str(fresh.path), *chosen, "--checkpoint", "last"])
    assert result.exit_code == 0, result.output
    names = [f"features-1-features.{layer}" for layer in (0, 3)]
    for name in names:
        assert f"{name}.png" in result.output
        assert (fresh.path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    html = page.build(fresh.path).read_text(encoding="utf-8")
    assert html.count('class="still"') == len(names)
    wrong = CliRunner().invoke(cli.app, ["show", "features", str(fresh.path), "--examples", "1;4"])
    assert str(wrong.exception) == "--examples: expected numbers with commas between them, such as 0,5,9, got '1;4'"


def test_the_feature_chart_shows_the_record(fresh):
    selection = Selection("validation", [1, 4], ["step-0", "last"])
    first, last = show_features(fresh.path, selection, layers="features.0", channels=[1, 0])
    chart = next(c for c in figures.charts(read(fresh.path)) if c.name.startswith("features-1-features.0"))
    inputs, image = chart.panels[0].series
    rows = np.stack([first.maps[0], last.maps[0]], 1).reshape(4, 2, 8, 8)  # example, then step
    tiles = image.z[: 4 * 9 - 1].reshape(-1, image.z.shape[1])
    for row in range(4):
        for column in range(2):
            tile = tiles[9 * row : 9 * row + 8, 9 * column : 9 * column + 8]
            np.testing.assert_allclose(tile, rows[row, column], rtol=1e-6)
    assert image.low == -image.high
    assert image.x_ticks[1] == ["1", "0"]
    targets = first.source.targets
    assert image.y_ticks[1] == [
        f"validation 1\nclass {targets[0]}\nstep 0", "step 4", f"validation 4\nclass {targets[1]}\nstep 0", "step 4"
    ]  # fmt: skip
    assert (np.nanmin(inputs.z), np.nanmax(inputs.z)) == (0, 1)
    assert np.isnan(inputs.z[9:17]).all(), "an input stands at its first row only"
    assert chart.caption.count(". ") == 0


def test_tiles_lie_side_by_side():
    tiles = np.arange(2 * 3 * 2 * 4, dtype=float).reshape(2, 3, 2, 4)
    x, y, z = mosaic(tiles, side=2.0, left=1.0)
    assert z.shape == (2 * 3 - 1, 3 * 5 - 1) == (len(y) - 1, len(x) - 1)
    np.testing.assert_array_equal(z[3:5, 5:9], tiles[1, 1])
    assert np.isnan(z[2]).all()
    assert np.isnan(z[:, 4]).all()
    np.testing.assert_allclose(x[[0, 4, 5, -1]], [1, 3, 3 + GAP, 1 + 3 * 2 + 2 * GAP])
    np.testing.assert_allclose(y[[2, 3]], [1, 1 + GAP])
    np.testing.assert_allclose(centres(x, 3), [2, 4 + GAP, 6 + 2 * GAP])


def attention_record(folder, step, weights, tokens, examples=(5,)):
    source = {"checkpoint": "x", "step": step, "split": "validation", "examples": examples, "targets": [1]}
    values = {"status": "complete", "layers": ["encoder.0"], "tokens": tokens, "source": source}
    folder.write_probe("attention_maps", str(step), values, {"weights.0": weights})


def test_the_attention_chart_shows_tokens_without_padding(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    folder.write_config({"name": "run"})
    weights = np.random.default_rng(0).dirichlet(np.ones(4), (2, 1, HEADS, 4))
    for index, step in enumerate((10, 20)):
        attention_record(folder, step, weights[index], [["[CLS]", "good", "$film"]])
    attention_record(folder, 30, weights[0], [["other"]], examples=(6,))  # another selection: a chart of its own
    first, second = figures.charts(read(folder.path))
    assert (first.name, second.name) == ("attention-1-encoder.0-5", "attention-1-encoder.0-6-2")
    assert [panel.title for panel in first.panels] == [
        "head 0, step 10", "head 1, step 10", "head 0, step 20", "head 1, step 20"
    ]  # fmt: skip
    assert first.columns == HEADS
    for place, panel in enumerate(first.panels):
        (image,) = panel.series
        np.testing.assert_array_equal(image.z, weights[place // 2, 0, place % 2, :3, :3])
        assert image.high == weights[:, :, :, :3, :3].max()
    assert first.panels[2].series[0].x_ticks[1] == first.panels[0].series[0].y_ticks[1] == ["[CLS]", "good", "$film"]
    matplotlib_backend.save(first, tmp_path / "picture.png")  # "$film" is no formula


def test_records_come_back(texts, tmp_path):
    maps = attention_maps(texts, ids())
    folder = RunFolder.create(tmp_path / "run")
    folder.write_probe("attention_maps", "0", *maps.to_record())
    again = from_record(AttentionMaps, *folder.read_record("attention_maps"))
    assert again.layers == maps.layers
    assert len(again.weights) == 2
    for one, other in zip(again.weights, maps.weights, strict=True):
        np.testing.assert_array_equal(one, other)
