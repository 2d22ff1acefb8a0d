# `make demo` and `make test` need only Python >= 3.10, make and a package index.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
INPUTS := pyproject.toml constraints.txt $(shell find src configs -type f -not -name '*.pyc')

.PHONY: demo test check report clean

demo: $(VENV)/.installed
	$(BIN)/losslab demo

test: check
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

clean:
	rm -rf $(VENV) build dist
