# `make quickstart` and `make test` set up all that they need; `make recovered` and `make packed` use what the quickstart
# made. Each can be run again.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
ARGS ?=
.PHONY: help quickstart packed recovered results test test-fast lint docs notebooks package assets assets-eval assets-mixture assets-gemma assets-qwen clean

help: ## This list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

quickstart: $(VENV)/.installed ## Learn a mask for a real model, export it, evaluate it (ten to twenty minutes on two cores)
	@$(BIN)/python -m experiments.assets quickstart
	@$(BIN)/python -m experiments.quickstart

packed: $(VENV)/.installed ## Pack the model of the quickstart, and generate from it (ARGS=--prompt=...)
	@test -d runs/quickstart/model || { echo "make: the quickstart has not made its model yet. Run make quickstart first."; exit 1; }
	@$(BIN)/leap_pl export --model runs/quickstart/model --output_dir runs/quickstart/packed --format packed --force
	@$(BIN)/leap_pl generate --model runs/quickstart/packed --prompt "The capital of France is" $(ARGS)

recovered: $(VENV)/.installed ## Train the weights that the quickstart's one-shot mask keeps, evaluate, export and pack them (minutes)
	@$(BIN)/python -m experiments.assets quickstart
	@$(BIN)/python -m experiments.recovered

results: $(VENV)/.installed ## The headline experiment: hours; stop it at any moment, run it again to go on (ARGS=--list)
	@$(BIN)/python -m experiments.assets quickstart
	@$(BIN)/python -m experiments.assets eval
	@$(BIN)/python -m experiments.assets mixture
	@$(BIN)/python -m experiments.headline $(ARGS)

test: $(VENV)/.installed-dev ## All tests, those on the real model in a short form
	@$(BIN)/python -m experiments.assets quickstart
	@$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

test-fast: $(VENV)/.installed-dev ## The tests that need no model
	@$(BIN)/python -m pytest -m "not real"

lint: $(VENV)/.installed-dev ## Style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docs: $(VENV)/.installed-docs ## The documentation site: build/site/index.html
	@$(BIN)/python -m sphinx --quiet --fail-on-warning --conf-dir docs . build/site

notebooks: $(VENV)/.installed-dev ## Run the notebooks on the embedded model, and keep what they show
	@$(BIN)/python -m experiments.assets quickstart
	@$(BIN)/python notebooks/execute.py notebooks/*.ipynb

package: $(VENV)/.installed-dev ## The sdist and the wheel in dist/, checked, and tried in an empty environment
	@rm -rf dist
	@$(BIN)/python -m build --outdir dist . >$(VENV)/build.log 2>&1 || { tail -n 20 $(VENV)/build.log; exit 1; }
	@$(BIN)/python -m twine check --strict dist/*
	@$(BIN)/python -m experiments.package dist

assets: $(VENV)/.installed ## The embedded model and text: assets/SmolLM2-135M-Instruct, assets/wikipedia
	@$(BIN)/python -m experiments.assets quickstart

assets-eval: $(VENV)/.installed ## The zero-shot tasks, for evaluation without a hub: assets/tasks, assets/howto, assets/science
	@$(BIN)/python -m experiments.assets eval

assets-mixture: $(VENV)/.installed ## Texts of several kinds, to learn on: assets/mixture, assets/mixture-questions
	@$(BIN)/python -m experiments.assets mixture

assets-gemma: $(VENV)/.installed ## Gemma 3 270M, under Gemma's terms of use: assets/gemma-3-270m
	@$(BIN)/python -m experiments.assets gemma

assets-qwen: $(VENV)/.installed ## Qwen2.5-Coder 1.5B (a download of 1 GB, 3 GB in the folder): assets/Qwen2.5-Coder-1.5B-Instruct
	@$(BIN)/python -m experiments.assets qwen

clean: ## Remove what runs have written; models, text and the environment stay
	rm -rf runs lightning_logs .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The stamp is newer than pyproject.toml exactly if the environment has what it asks for.
define install
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || command -v $(PYTHON) >/dev/null \
	  || { echo "make: $(PYTHON) is not there. Install Python 3.11, or name one: make PYTHON=python3.12"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "installing leap_pl into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.$(1)' >$(VENV)/install.log 2>&1 \
	  || { echo "make: the packages could not be installed ($$(grep -m1 -o 'ERROR.*' $(VENV)/install.log || tail -n 1 $(VENV)/install.log)). Is a package registry reachable? All that pip said: $(VENV)/install.log"; exit 1; }
	@touch $@
endef

$(VENV)/.installed: pyproject.toml
	$(call install,)

$(VENV)/.installed-docs: pyproject.toml
	$(call install,[docs])
	@touch $(VENV)/.installed

$(VENV)/.installed-dev: pyproject.toml
	$(call install,[dev])
	@touch $(VENV)/.installed
