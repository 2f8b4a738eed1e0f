# `make` lists what there is. Uses uv where it is installed, else venv and pip.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null)
SOURCES := src tests benchmarks

ifdef UV
CREATE := $(UV) venv --quiet --seed --allow-existing --python '>=3.11' $(VENV)
INSTALL := $(UV) pip install --quiet --compile-bytecode --python $(BIN)/python
else
CREATE := $(PYTHON) -m venv $(VENV)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
endif

.DEFAULT_GOAL := help
.PHONY: help quickstart fast fit test lint types suite format tensorboard clean

help: ## list these targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

quickstart: $(VENV)/.installed ## set up, then train and test on bundled digits: no network but the package index
	$(BIN)/python -m digitnet fit --config configs/quickstart.yaml
	$(BIN)/python -m digitnet test

fast: $(VENV)/.installed ## set up, then fetch MNIST, train for a minute and test
	$(BIN)/python -m digitnet fit --config configs/fast.yaml
	$(BIN)/python -m digitnet test

fit: $(VENV)/.installed ## set up, then train the write-up's final model on MNIST and test
	$(BIN)/python -m digitnet fit --config configs/final.yaml
	$(BIN)/python -m digitnet test

test: lint types suite ## set up for development, then lint, types and the test suite

lint: $(VENV)/.installed-dev ## style and format
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: $(VENV)/.installed-dev ## static types
	$(BIN)/mypy

suite: $(VENV)/.installed-dev ## the test suite; on real MNIST too where SCIKIT_LEARN_DATA has it
	$(BIN)/python -m pytest -n 2 --dist worksteal

format: $(VENV)/.installed-dev ## rewrite the sources in house format
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

tensorboard: $(VENV)/.installed ## watch the runs in a browser
	$(BIN)/tensorboard --logdir lightning_logs

clean: ## remove the environment and the caches; runs and data stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache

$(VENV)/.installed: pyproject.toml
	$(CREATE)
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml
	$(CREATE)
	$(INSTALL) --editable ".[dev]"
	@touch $@ $(VENV)/.installed
