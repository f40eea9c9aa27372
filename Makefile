# `make train` and `make test` do all the set-up. PYTHON=python3.12 chooses the interpreter.
PYTHON ?= python3
RECIPE ?= recipes/debug.yaml
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP_ARGS ?=

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.PHONY: train test lint schema faults gpu-check clean

# One process per GPU, at most one per micro-batch; two gloo processes where there is no GPU.
train: $(VENV)/.user
	@echo "[3/3] training $(RECIPE)"
	@exec $(BIN)/cifar-dist train $(RECIPE) $(ARGS) --processes auto 2>&1

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

gpu-check: $(VENV)/.dev
	benchmarks/gpu_check.sh a
	benchmarks/gpu_check.sh b

faults: $(VENV)/.dev
	$(BIN)/python -m pytest -m fault

schema: $(VENV)/.user
	$(BIN)/python docs/make_schema.py

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "cifar_dist needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@echo "[1/3] creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# pip with progress bars in a terminal, otherwise one line for each large download; without its warnings.
define install
	@pip() { $(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e $(1) 2> >(grep -v '^WARNING:' >&2); }; \
	if [ -t 1 ]; then pip; else pip | { grep --line-buffered -E '^ *Downloading .*([0-9]{2} MB|GB)|^Installing' | cut -c 1-100 || true; }; fi
	@touch $@
endef

$(VENV)/.user: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "[2/3] installing; downloads about 3.2 GB on Linux, mostly PyTorch with CUDA (once)"
	$(call install,.)

$(VENV)/.dev: $(VENV)/.user
	@echo "installing the tools for development"
	$(call install,'.[dev]')

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
