# make demo: set up, build the offline assets, train on two CPU cores.  make test: set up, lint, types, all tests.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
PYTHON ?= python3.11
EXTRA ?= cpu
ARGS ?=
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements/$(EXTRA).txt
STAMP := $(VENV)/.installed-$(EXTRA)
TRL_VENV := .venv-trl
TRL_STAMP := $(TRL_VENV)/.installed
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup assets demo benchmark test test-fast test-slow test-faults test-fuzz test-architectures lint types lock clean
.DEFAULT_GOAL := help

help: ## show this
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## a virtual environment with the locked packages (EXTRA=gpu for a GPU machine)

# The stamp comes last: an interrupted installation is taken up again, from an environment still without pip too.
$(STAMP): $(LOCK) pyproject.toml
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@rm -f $(VENV)/.installed-*
	@echo "installing $(LOCK) into $(VENV): a few minutes the first time"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps -r $(LOCK)
	@[ $(EXTRA) != cpu ] || grep -q '^cuda.*= None' $(VENV)/lib/python*/site-packages/torch/version.py || \
	  { echo "torch is a CUDA build, and $(LOCK) has none of the libraries that it needs. Tell pip where torch's CPU builds are:" \
	         "export PIP_EXTRA_INDEX_URL= and the index that torch's installation page names for CPU; then rm -r $(VENV) and again" >&2; exit 1; }
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

assets: setup ## the demo's models and data, built once into the user's cache
	@$(BIN)/ppo-ray assets imdb

demo: assets ## train the 135M demo policy (ARGS="steps=5 output_dir=runs/short" to change options)
	@$(BIN)/ppo-ray train configs/imdb.yaml $(ARGS)

# TRL 0.11.3 wants libraries of its time, so it lives in an environment of its own; the stamp comes last, as above.
$(TRL_STAMP): requirements/trl.txt
	@$(TRL_VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(TRL_VENV)
	@rm -f $@
	@echo "installing requirements/trl.txt into $(TRL_VENV): a minute the first time"
	@$(TRL_VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-deps -r requirements/trl.txt
	@touch $@

benchmark: assets $(TRL_STAMP) ## ppo_ray beside TRL 0.11.3: an hour, see docs/performance.md (ARGS="--batch-size 128")
	@$(BIN)/python -m benchmarks.compare $(ARGS)

test: lint types assets test-fast test-slow ## everything

test-fast: setup ## tests that start neither vLLM nor Ray
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist worksteal

test-slow: assets ## tests with real vLLM, real Ray, real models
	$(BIN)/python -m pytest -m slow -n $(JOBS) --dist worksteal

test-faults: assets ## tests/faults alone, with ten kills of each kind of worker instead of two
	$(BIN)/python -m pytest -m slow -n $(JOBS) --dist worksteal --kills 10 tests/faults

test-fuzz: setup ## tests/fuzz alone, with ten times as many hostile files: a few minutes
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --hypothesis-profile long tests/fuzz

test-architectures: setup ## every architecture of transformers, not the day's sample: an hour, most of it vLLM
	PPO_RAY_ALL_ARCHITECTURES=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests/architectures

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

lock: setup requirements/cpu.lock requirements/gpu.lock requirements/trl.lock ## remake requirements/*.txt

# The CPU lock takes torch's CPU build from where pip finds it, the GPU lock does not. torch's local version (+cpu) is left
# out, so that the lock can be installed wherever a build of that version is to be had.
requirements/cpu.lock requirements/trl.lock: export UV_FIND_LINKS := $(PIP_FIND_LINKS)
requirements/cpu.lock requirements/trl.lock: export UV_EXTRA_INDEX_URL := $(PIP_EXTRA_INDEX_URL)
PLATFORM := --python-version 3.11 --python-platform x86_64-manylinux_2_28
requirements/%.lock: setup
	@{ echo "# Made by \`make lock\` from pyproject.toml and requirements/overrides-$*.txt; install with: pip install --no-deps -r"; \
	  $(BIN)/uv pip compile --quiet pyproject.toml --extra $* --extra demo --extra dev \
	    --override requirements/overrides-$*.txt $(PLATFORM) --no-header --no-annotate | sed 's/+cpu$$//'; } > $@
	@mv $@ requirements/$*.txt

# Its packages may come from any of the indexes, as with pip: not all have old versions.
requirements/trl.lock: setup
	@{ echo "# Made by \`make lock\` from requirements/trl.in; install with: pip install --no-deps -r"; \
	  $(BIN)/uv pip compile --quiet requirements/trl.in --index-strategy unsafe-best-match \
	    $(PLATFORM) --no-header --no-annotate | sed 's/+cpu$$//'; } > $@
	@mv $@ requirements/trl.txt

clean: ## remove the virtual environments and caches (not runs/, not the assets)
	rm -rf $(VENV) $(TRL_VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
