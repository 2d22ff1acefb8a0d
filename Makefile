# `make demo` and `make test` need only Python >= 3.10, make and a package index.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
INPUTS := pyproject.toml constraints.txt $(shell find src configs -type f -not -name '*.pyc')

.PHONY: demo test check clean

demo: $(VENV)/.installed
	$(BIN)/losslab demo

test: check $(VENV)/.browser
	$(BIN)/python -m pytest -n auto

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy

# An ordinary install of this package; run again whenever one of its files changed.
$(VENV)/.installed: $(VENV)/.dependencies $(INPUTS)
	$(BIN)/pip install --quiet --no-deps --force-reinstall -c constraints.txt .
	touch $@

$(VENV)/.dependencies: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt ".[dev]"
	touch $@

# The report's browser test needs a Chromium; without one (and without the rights to install it) that test is skipped.
$(VENV)/.browser: $(VENV)/.dependencies
	command -v chromium >/dev/null || command -v chromium-browser >/dev/null || \
	  { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
	    apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; } || \
	  echo "no Chromium: the browser test will be skipped"
	touch $@

clean:
	rm -rf $(VENV) build dist
