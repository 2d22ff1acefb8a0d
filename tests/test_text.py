"""Texts become token ids by a vocabulary that only the training split decides; BERT reads them, padding unseen."""

import os
import random
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from cases import gen
from losslab.studies.data import load_dataset, vocabulary
from losslab.studies.models import bert, build_model
from losslab.studies.sections import DatasetConfig, ModelConfig
from second_derivatives import assert_hessian

GOOD, BAD = ("a fine film", "wonderful and warm", "great fun"), ("a dull film", "awful and cold", "no fun")


def phrases(count: int) -> list[tuple[str, int]]:
    """Different texts of both classes in turn, sorted by nothing in particular."""
    return [(f"{(GOOD, BAD)[i % 2][i % 3]} number {i // 3}", 1 - i % 2) for i in range(count)]


def written(folder: Path, train=None, dev=None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train.tsv", train or phrases(120)), ("dev.tsv", dev or phrases(12))):
        lines = "".join(f"{text} \t{label}\n" for text, label in rows)
        (folder / name).write_text("sentence\tlabel\n" + lines, encoding="utf-8")
    return folder


def config(folder: Path, **changes) -> DatasetConfig:
    return DatasetConfig(**{"name": f"sst2:{folder}", "max_length": 12, "vocabulary": 120} | changes)


def spelled(data, split, row: int) -> list[str]:
    return [data.vocabulary[i] for i in getattr(data, split).inputs[row]]


def test_texts_are_token_ids_filled_up_with_zeros(tmp_path):
    data = load_dataset(config(written(tmp_path)))
    assert data.train.inputs.dtype == torch.int64
    assert data.input_shape == (12,)
    assert data.num_classes == 2
    assert [len(split) for split in (data.train, data.validation, data.test)] == [114, 6, 12]
    words = spelled(data, "test", 0)
    assert words[0] == "[CLS]"
    assert words.index("[SEP]") == words.index("[PAD]") - 1
    assert set(words[words.index("[PAD]") :]) == {"[PAD]"}
    assert "".join(words[1 : words.index("[SEP]")]).replace("##", "") == "afinefilmnumber0"
    assert len(data.vocabulary) <= 120
    assert data.vocabulary[:4] == ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    cut = load_dataset(config(tmp_path, max_length=4))
    assert cut.input_shape == (4,)
    assert spelled(cut, "test", 0)[0::3] == ["[CLS]", "[SEP]"]
    # The files lie at <root>/SST-2 for the plain name.
    written(tmp_path / "SST-2")
    same = load_dataset(config(tmp_path, name="sst2", root=str(tmp_path)))
    assert torch.equal(same.test.inputs, data.test.inputs)


def texts_of(data, split) -> set[tuple[int, ...]]:
    return {tuple(row) for row in getattr(data, split).inputs.tolist()}


def test_splits_depend_on_the_texts_alone(tmp_path):
    rows = phrases(120)
    data = load_dataset(config(written(tmp_path / "a", rows)))
    turned = load_dataset(config(written(tmp_path / "b", rows[::-1])))
    assert torch.equal(data.validation.inputs, turned.validation.inputs)
    assert torch.equal(data.train.targets, turned.train.targets)
    # A phrase that is there twice, spelled otherwise, lies on one side; whichever is asked, the other side has none.
    doubled = [*rows, *((f"  {text.upper()} ", label) for text, label in rows)]
    data = load_dataset(config(written(tmp_path / "c", doubled)))
    assert len(data.train) + len(data.validation) == 240
    assert len(data.validation) == 12
    assert not texts_of(data, "train") & texts_of(data, "validation")
    # Sorted by class in the file, mixed in the split.
    data = load_dataset(config(written(tmp_path / "d", sorted(rows, key=lambda row: row[1]))))
    assert 10 < data.train.head(40).targets.sum() < 30


def test_the_vocabulary_sees_the_training_split_only(tmp_path):
    """Each phrase has a sign of its own, which is a token of its own where it was seen."""
    rows = [(f"film {chr(0x4E00 + i)}", i % 2) for i in range(120)]
    data = load_dataset(config(written(tmp_path, rows, [("film \u6000", 1)]), vocabulary=600))
    unknown = data.vocabulary.index("[UNK]")
    assert not (data.train.inputs == unknown).any()
    assert (data.validation.inputs == unknown).any(1).all()
    assert (data.test.inputs == unknown).any(1).all()
    assert sum(len(token) == 1 and token >= "\u4e00" for token in data.vocabulary) == len(data.train) == 114


def test_the_same_texts_give_the_same_vocabulary(tmp_path):
    """The library's trainer alone numbers letters in the order of a hash map, another one in each training."""
    draw = random.Random(0)
    texts = [" ".join("".join(draw.choices("abcdefgh", k=4)) for _ in range(5)) for _ in range(300)]
    found = {vocabulary.names(vocabulary.trained(texts, 300, tmp_path / "none")) for _ in range(6)}
    assert len(found) == 1
    assert len(found.pop()) == 300


def test_vocabularies_are_kept_and_damaged_files_made_anew(tmp_path, monkeypatch):
    folder = written(tmp_path)
    first = load_dataset(config(folder))
    (kept,) = folder.glob("wordpiece-120-*.json")
    content = kept.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(vocabulary.tokenizers().trainers, "WordPieceTrainer", None)  # nothing is trained again
        assert load_dataset(config(folder)).vocabulary == first.vocabulary
    kept.write_text("{")
    assert load_dataset(config(folder)).vocabulary == first.vocabulary
    assert kept.read_bytes() == content
    assert not list(folder.glob(".*"))
    load_dataset(config(folder, vocabulary=100))
    written(folder, phrases(130))
    load_dataset(config(folder))
    assert len(list(folder.glob("wordpiece-*.json"))) == 3
    # A folder that cannot be written to is no obstacle.
    monkeypatch.setattr(vocabulary, "write_atomically", lambda *_: (_ for _ in ()).throw(PermissionError()))
    kept.unlink()
    written(folder)
    assert load_dataset(config(folder)).vocabulary == first.vocabulary


def test_a_checkpoints_own_vocabulary(tmp_path):
    folder, own = written(tmp_path / "texts"), tmp_path / "checkpoint"
    own.mkdir()
    with pytest.raises(ValueError, match=r"dataset\.vocabulary: expected a number of tokens, or a folder with tok"):
        load_dataset(config(folder, vocabulary=str(own)))
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "fine", "film", "a"]
    (own / "vocab.txt").write_text("\n".join(tokens) + "\n")
    data = load_dataset(config(folder, vocabulary=str(own)))
    assert data.vocabulary == tuple(tokens)
    assert spelled(data, "test", 0)[:7] == ["[CLS]", "a", "fine", "film", "[UNK]", "[UNK]", "[SEP]"]
    assert not list(folder.glob("wordpiece*"))
    trained = vocabulary.trained([text for text, _ in phrases(40)], 90, tmp_path)
    trained.save(str(own / "tokenizer.json"))
    assert load_dataset(config(folder, vocabulary=str(own))).vocabulary == vocabulary.names(trained)
    (own / "tokenizer.json").unlink()
    (own / "vocab.txt").write_text("\n".join(tokens[1:] + tokens[:1]))
    with pytest.raises(ValueError, match=r"expected \[PAD\] as token 0 in .*checkpoint, got '\[UNK\]'"):
        load_dataset(config(folder, vocabulary=str(own)))
    (own / "vocab.txt").write_text("\n".join(tokens[:3]))
    with pytest.raises(ValueError, match=r"expected the tokens \[PAD\], \[UNK\].*, got none for \[SEP\]"):
        load_dataset(config(folder, vocabulary=str(own)))


def test_capital_letters_of_a_vocabulary_are_kept(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nFine\nfine\n")
    ids = vocabulary.encoded(vocabulary.stored(tmp_path), ["Fine fine"], 4)
    assert ids.tolist() == [[2, 4, 5, 3]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected a line sentence<TAB>label and texts below, got ''"),
        ("sentence\tlabel\n", "expected a line sentence<TAB>label and texts below"),
        ("text\tclass\nfine\t1\n", "got 'text"),
        ("sentence\tlabel\nfine\t1\nfilm\n", "train.tsv: line 3: expected sentence<TAB>class, got 'film'"),
        ("sentence\tlabel\nfine\tgood\n", "line 2: expected sentence<TAB>class"),
        ("sentence\tlabel\nfine\t1\n", "expected different texts to train on, got too few"),
    ],
)
def test_broken_files_are_refused(tmp_path, content, message):
    (written(tmp_path) / "train.tsv").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_dataset(config(tmp_path))


def test_impossible_settings_are_refused(tmp_path):
    folder = written(tmp_path)
    with pytest.raises(ValueError, match=r"dataset\.max_length: expected at least 3, .* got 2"):
        load_dataset(config(folder, max_length=2))
    with pytest.raises(ValueError, match=r"dataset\.vocabulary: expected at least \d+ tokens, .* got 10"):
        load_dataset(config(folder, vocabulary=10))
    with pytest.raises(ValueError, match=r"dataset\.augment: expected images .* for crop, got inputs of shape \(12,\)"):
        load_dataset(config(folder, augment=("crop",)))
    (folder / "dev.tsv").write_bytes(b"sentence\tlabel\n\xff\t1\n")
    with pytest.raises(ValueError, match=r"dev\.tsv: expected text in UTF-8"):
        load_dataset(config(folder))


def hub(**changes) -> types.ModuleType:
    """What `datasets` gives for GLUE's SST-2, small."""
    library = types.ModuleType("datasets")
    parts = {"train": phrases(120), "validation": phrases(12)}
    found = {
        name: {"sentence": [f"{text} " for text, _ in rows], "label": [label for _, label in rows]}
        for name, rows in parts.items()
    }
    library.load_dataset = lambda *names: {**found, "names": names, **changes}
    return library


def test_sst2_is_fetched_when_asked_for_and_whole_or_not_at_all(tmp_path, monkeypatch):
    plain = {"name": "sst2", "root": str(tmp_path / "root")}
    with pytest.raises(ValueError, match=r"train\.tsv is not there; .* --set dataset\.download=true"):
        load_dataset(config(tmp_path, **plain))
    monkeypatch.setitem(sys.modules, "datasets", hub(validation=None))  # breaks after train.tsv was written
    with pytest.raises(ValueError, match=r"dataset\.download: sst2 could not be fetched into .*; nothing was kept"):
        load_dataset(config(tmp_path, **plain, download=True))
    assert not (tmp_path / "root").exists()
    monkeypatch.setitem(sys.modules, "datasets", hub())
    fetched = load_dataset(config(tmp_path, **plain, download=True))
    monkeypatch.setitem(sys.modules, "datasets", None)  # not needed again
    assert torch.equal(load_dataset(config(tmp_path, **plain, download=True)).train.inputs, fetched.train.inputs)
    written(tmp_path / "own")
    for name in ("train.tsv", "dev.tsv"):
        assert (tmp_path / "root" / "SST-2" / name).read_bytes() == (tmp_path / "own" / name).read_bytes()
    with pytest.raises(ValueError, match=r"datasets: expected it installed, .* pip install datasets"):
        load_dataset(config(tmp_path, name="sst2", root=str(tmp_path / "other"), download=True))


def tiny(monkeypatch, length=6, tokens=30, classes=3, **changes) -> nn.Module:
    """A BERT small enough for tests."""
    small = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    monkeypatch.setitem(bert.SIZES, "bert_tiny", small)
    settings = ModelConfig(**{"name": "bert_tiny"} | changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_model(settings, (length,), classes, [str(i) for i in range(tokens)])


def test_bert_reads_texts_and_padding_makes_no_difference(monkeypatch):
    model = tiny(monkeypatch, init_scale=20.0).double().eval()  # its own first weights look at all tokens nearly alike
    ids = torch.tensor([[2, 7, 8, 3, 0, 0], [2, 9, 3, 0, 0, 0]])
    logits = model(ids)
    assert logits.shape == (2, 3)
    torch.testing.assert_close(logits[:1], model(ids[:1, :4]), atol=1e-12, rtol=0)
    assert (logits[:1] - model(torch.tensor([[2, 7, 8, 3, 5, 0]]))).abs().max() > 1e-3
    cross_entropy(logits, torch.tensor([0, 2])).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not idle
    again = tiny(monkeypatch, init_scale=20.0).double().eval()
    assert torch.equal(model(ids), again(ids))  # the seed decides


def test_berts_gradients_can_be_vectorised_over_examples(monkeypatch):
    model = tiny(monkeypatch).eval()
    ids, targets = torch.tensor([[2, 7, 8, 3, 0, 0], [2, 9, 5, 4, 6, 3]]), torch.tensor([0, 2])
    params = dict(model.named_parameters())

    def loss(values, x, y):
        return cross_entropy(functional_call(model, values, (x[None],)), y[None])

    each = vmap(grad(loss), (None, 0, 0))(params, ids, targets)
    alone = torch.autograd.grad(cross_entropy(model(ids[:1]), targets[:1]), list(params.values()))
    for found, expected in zip(each.values(), alone, strict=True):
        torch.testing.assert_close(found[0], expected)


def test_berts_hessian_is_the_gradients_derivative(monkeypatch):
    model = tiny(monkeypatch).double().eval()
    ids = torch.randint(1, 30, (3, 6), generator=gen(0))
    ids[0, 4:] = 0
    assert_hessian(model, ids, torch.tensor([0, 1, 2]))


def test_bert_learns_texts(tmp_path, monkeypatch):
    data = load_dataset(config(written(tmp_path), max_length=8))
    model = tiny(monkeypatch, 8, len(data.vocabulary), 2).eval()  # without dropout it needs few steps
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(50):
        optimizer.zero_grad()
        cross_entropy(model(data.train.inputs), data.train.targets).backward()
        optimizer.step()
    assert (model(data.validation.inputs).argmax(1) == data.validation.targets).all()


def test_a_checkpoint_from_a_folder(tmp_path, monkeypatch):
    model, library = tiny(monkeypatch), bert.transformers()
    model.network.save_pretrained(tmp_path / "saved")
    level = library.utils.logging.get_verbosity()
    # The last layer has another number of classes: it alone is new.
    loaded = tiny(monkeypatch, 5, 29, 3, pretrained=str(tmp_path / "saved"))
    assert library.utils.logging.get_verbosity() == level
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert loaded.network.config._attn_implementation == "eager"
    own = str(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"knows 30 tokens, the data have 31; set dataset\.vocabulary to the check"):
        tiny(monkeypatch, 6, 31, pretrained=own)
    with pytest.raises(ValueError, match=r"takes 6 tokens, got 7; set dataset\.max_length=6"):
        tiny(monkeypatch, 7, 30, pretrained=own)
    (tmp_path / "saved" / "model.safetensors").rename(tmp_path / "saved" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"model\.pretrained: expected model\.safetensors in .*saved"):
        tiny(monkeypatch, pretrained=own)
    with pytest.raises(ValueError, match=r"expected a folder with config\.json .*'no/where'; fetch it with `hf downl"):
        tiny(monkeypatch, pretrained="no/where")
    library.DistilBertConfig().save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"expected a BERT, got distilbert in .*other"):
        tiny(monkeypatch, pretrained=str(tmp_path / "other"))


def test_sizes_are_those_of_the_literature():
    """With BERT's own vocabulary and length; counted without making the weights."""
    found = {}
    for name in ("bert_base", "bert_tiny"):
        with torch.device("meta"):
            model = build_model(ModelConfig(name=name), (512,), 2, [""] * 30522)
        found[name] = sum(p.numel() for p in model.parameters())
    # 109,482,240 and 4,385,920 for the published encoders, less the second kind of segment, and two logits more.
    assert found == {"bert_base": 109_482_240 - 768 + 2 * 769, "bert_tiny": 4_385_920 - 128 + 2 * 129}


def test_texts_and_networks_must_fit():
    words = ["[PAD]", "a"]
    for name in ("bert_base", "bert_tiny"):
        with pytest.raises(ValueError, match=rf"model\.name: {name} takes texts, got \(3, 32, 32\); use simple_cnn"):
            build_model(ModelConfig(name=name), (3, 32, 32), 10)
        with pytest.raises(ValueError, match=rf"model\.name: {name} takes texts, got \(8,\); use mlp"):
            build_model(ModelConfig(name=name), (8,), 10)
    for name in ("simple_cnn", "resnet18", "vit_tiny", "deep"):
        with pytest.raises(ValueError, match=rf"{name} takes \(channels, .* got texts of 8 tokens; use bert_tiny"):
            build_model(ModelConfig(name=name), (8,), 2, words)
    with pytest.raises(ValueError, match="mlp takes numbers, got texts of 8 tokens; use bert_tiny"):
        build_model(ModelConfig(name="mlp"), (8,), 2, words)
    with pytest.raises(ValueError, match=r"model\.pretrained: mlp takes none, expected null, got 'x'"):
        build_model(ModelConfig(name="mlp", pretrained="x"), (8,), 2)


def test_missing_packages_are_one_line(monkeypatch):
    for name, function in (("transformers", bert.transformers), ("tokenizers", vocabulary.tokenizers)):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ValueError, match=rf"{name}: expected it installed, .* pip install {name}"):
            function()


DATA = Path(os.environ.get("LOSSLAB_DATA", "no data"))


@pytest.mark.skipif(not (DATA / "SST-2" / "train.tsv").is_file(), reason="needs SST-2 in $LOSSLAB_DATA")
def test_the_real_sst2(tmp_path):
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).symlink_to(DATA / "SST-2" / name)
    data = load_dataset(DatasetConfig(name=f"sst2:{tmp_path}", max_length=48))
    assert [len(split) for split in (data.train, data.validation, data.test)] == [63_982, 3_367, 872]
    assert len(data.vocabulary) == 8000
    unknown = (data.test.inputs == data.vocabulary.index("[UNK]")).sum()
    assert unknown <= 5
    shares = [float(split.targets.double().mean()) for split in (data.train, data.validation, data.test)]
    assert shares == pytest.approx([0.558, 0.562, 0.509], abs=1e-3)
    assert (data.train.inputs[:, -1] == 0).double().mean() > 0.99
