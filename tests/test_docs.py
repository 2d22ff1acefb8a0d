"""Docs that are executed do not drift: doctests, the README's Python example and its output, commands and paths."""

import contextlib
import dataclasses
import doctest
import importlib
import io
import pkgutil
import re
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import losslab
from losslab import cli
from losslab.probes import PROBES
from losslab.studies.demo import QUICK

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
MODULES = [m.name for m in pkgutil.walk_packages(losslab.__path__, "losslab.") if m.name != "losslab.__main__"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_there_are_doctests():
    finder = doctest.DocTestFinder()
    found = sum(len(t.examples) for name in MODULES for t in finder.find(importlib.import_module(name)))
    assert found >= 8


def test_readme_example_prints_what_it_says():
    (code,) = blocks("python")
    (expected,) = blocks("text output")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    printed_lines, expected_lines = printed.getvalue().strip().splitlines(), expected.strip().splitlines()
    assert len(printed_lines) == len(expected_lines)
    for got, said in zip(printed_lines, expected_lines, strict=True):
        assert NUMBER.sub("#", got) == NUMBER.sub("#", said)
        # Other processors round differently, and 100 steps of training carry it on; error bounds are sizes only.
        numbers = [NUMBER.findall(re.sub(r"± \S+", "", text)) for text in (got, said)]
        for a, b in zip(*numbers, strict=True):
            assert float(a) == pytest.approx(float(b), rel=0.25), (got, said)


def test_readme_commands_run(tmp_path, monkeypatch):
    """Every `losslab` command of the README, in order, at small settings."""
    monkeypatch.chdir(tmp_path)
    tiny = (*QUICK.overrides, "training.epochs=1", "model.width=4", "schedule.warmup_steps=1", "probes.examples=32")
    monkeypatch.setattr("losslab.cli.training.QUICK", dataclasses.replace(QUICK, overrides=tiny))
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("losslab ")]
    assert len(commands) >= 5
    for line in commands:
        arguments = shlex.split(line, comments=True)[1:]
        if arguments[0] == "demo" and "--quick" not in arguments:
            arguments.append("--quick")
        if arguments[0] == "train":
            arguments += ["--set", "training.epochs=1", "--set", "model.width=4", "--set", "probes.examples=64"]
        result = CliRunner().invoke(cli.app, arguments)
        assert result.exit_code == 0, (line, result.output, result.exception)


def test_readme_install_lines_name_what_is_there():
    text = "\n".join(blocks("bash"))
    for name in re.findall(r"-c (\S+)", text):
        assert (ROOT / name).is_file()
    for target in re.findall(r"^make (\w+)", text, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_readme_paths_exist():
    package = ROOT / "src" / "losslab"
    for path in re.findall(r"`([\w/]+\.(?:py|yaml|md|png))`", README) + re.findall(r"\]\(([\w/.-]+)\)", README):
        assert (ROOT / path).exists() or (package / path).exists(), path


def test_every_probe_and_public_name_is_in_the_readme_or_the_docs():
    docs = README + "".join(p.read_text(encoding="utf-8") for p in (ROOT / "docs").glob("*.md"))
    missing = [name for name in [*PROBES, *losslab.__all__] if not re.search(rf"\b{name}\b", docs)]
    assert not missing, missing


PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_of_the_docs_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        with contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng():
            exec(compile(code, page.name, "exec"), {"__name__": page.stem})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_pictures_of_the_docs_exist(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
