# make demo: set up, build the offline assets, train on two CPU cores.  make test: set up, lint, types, all tests.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
export PYTHON ?=
EXTRA ?= cpu
ARGS ?=
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
TRL_VENV := .venv-trl
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup assets demo demo-toy demo-arithmetic benchmark gpu-check test test-fast test-slow test-faults test-fuzz test-architectures lint types docs lock clean
.DEFAULT_GOAL := help

help: ## show this
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "make %-19s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## a virtual environment with the locked packages, made, mended or left alone (EXTRA=gpu for a GPU machine)
	@$(or $(PYTHON),python3) requirements/set_up.py $(EXTRA)

assets: setup ## the demo's models and data, built once into the user's cache
	@$(BIN)/ppo-ray assets imdb

demo: setup ## train the 135M demo policy, go on with it, or show what it left (ARGS="steps=5 output_dir=runs/short")
	@$(BIN)/ppo-ray demo $(ARGS)

demo-toy: setup ## a first look in a minute: a tiny policy learns to write vowels
	@$(BIN)/ppo-ray demo --task toy $(ARGS)

demo-arithmetic: setup ## teach a 135M chat model sums, with the right answers as the reward
	@$(BIN)/ppo-ray demo --task arithmetic $(ARGS)

# TRL 0.11.3 wants libraries of its time, so it lives in an environment of its own.
SHAPES ?= notebook chat
benchmark: assets ## ppo_ray beside TRL 0.11.3: two to three hours, see docs/internals.md (SHAPES=notebook: one; ARGS="--rounds 1")
	@$(or $(PYTHON),python3) requirements/set_up.py trl
	@for shape in $(SHAPES); do $(BIN)/python -m benchmarks.compare --shape $$shape $(ARGS); done

gpu-check: setup ## whether everything works on this GPU: ten minutes on one card (ARGS="--only update logits")
	@$(BIN)/python -m benchmarks.gpu_acceptance $(ARGS)

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

lint: setup ## ruff: style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup ## mypy
	$(BIN)/mypy

docs: setup ## the documentation as a site in site/, links checked
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

LOCKS := pip torch-cuda cpu gpu dev trl
lock: setup $(LOCKS:%=requirements/%.lock) ## remake requirements/*.txt, with the versions that they have (UPGRADE=--upgrade: newer)

# One lock serves all Python versions, and Linux on x86-64 alone ([tool.uv] in pyproject.toml): no line repeats that.
# torch is in none but gpu.txt: its CPU build is in torch-cpu.txt, PyPI's build and CUDA's libraries are in torch-cuda.txt.
# dev.txt holds what developers need beyond cpu.txt or gpu.txt, which images install without it.
SERVED := python_full_version < '3.14' and implementation_name == 'cpython' and platform_machine == 'x86_64' and \
  platform_python_implementation == 'CPython' and sys_platform == 'linux'
UPGRADE ?=
COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest --generate-hashes \
  --no-header --no-annotate $(UPGRADE) --output-file requirements/$*.txt
TORCH = $(shell sed -n 's/^torch==\([^+ ]*\).*/\1/p' requirements/torch-cpu.txt)
NO_TORCH = $(shell sed -n 's/^\([a-z0-9-]*\)==.*/--no-emit-package \1/p' requirements/torch-cuda.txt)
NO_CPU = -c requirements/cpu.txt $(shell sed -n 's/^\([a-z0-9-]*\)==.*/--no-emit-package \1/p' requirements/cpu.txt)
NO_PURE = $(patsubst %,--no-emit-package %,filelock fsspec jinja2 markupsafe mpmath networkx setuptools sympy triton typing-extensions)
PROJECT = pyproject.toml --extra $* --extra demo --override requirements/overrides-$*.txt $(wildcard requirements/$*.in)

requirements/pip.lock: INPUT = - <<<pip
requirements/torch-cuda.lock: INPUT = - $(NO_PURE) <<<torch==$(TORCH)
requirements/cpu.lock: INPUT = $(PROJECT) $(NO_TORCH)
requirements/gpu.lock: INPUT = $(PROJECT)
requirements/dev.lock: INPUT = pyproject.toml --extra dev --extra docs $(NO_CPU) $(NO_TORCH)
requirements/dev.lock: requirements/cpu.lock
requirements/trl.lock: INPUT = requirements/trl.in $(NO_TORCH)
requirements/%.lock:
	@$(COMPILE) $(INPUT)
	@{ echo "# Made by \`make lock\`; pip install --no-deps -r installs it, and nothing whose checksum is not here."; \
	  sed "s/ ; $(SERVED)//" requirements/$*.txt; } > $@
	@mv $@ requirements/$*.txt

clean: ## remove the virtual environments and caches (not runs/, not the assets)
	rm -rf $(VENV) $(TRL_VENV) site .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
