# `make train` and `make test` do all the set-up. PYTHON=python3.12 chooses the interpreter.
PYTHON ?= python3
RECIPE ?= recipes/debug.yaml
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
GPUS := $(shell nvidia-smi --list-gpus 2>/dev/null | wc -l)

.PHONY: train test lint schema faults gpu-check clean

# Two gloo processes where there is no GPU; otherwise one per GPU, at most one per micro-batch.
train: $(VENV)/.user
	@case $(GPUS) in \
	0) set -- --config_file accelerate_configs/cpu_2.yaml ;; \
	1) set -- --num_processes 1 ;; \
	*) micro_batches=$$($(BIN)/python -m cifar_dist.train --dry-run --json $(RECIPE) $(ARGS) 2>/dev/null | \
		$(BIN)/python -c 'import json, sys; print(json.load(sys.stdin)["recipe"]["run"]["micro_batches"] or $(GPUS))'); \
	set -- --num_processes $$((micro_batches < $(GPUS) ? micro_batches : $(GPUS))) ;; \
	esac; \
	$(BIN)/accelerate launch "$$@" -m cifar_dist.train $(RECIPE) $(ARGS) 2>&1

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
	$(BIN)/python -c "from cifar_dist.recipe.schema import json_schema; from cifar_dist.utils.files import write_json; from pathlib import Path; write_json(Path('recipes/schema.json'), json_schema())"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "cifar_dist needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	@echo "making $(VENV) (once; some minutes, mostly the download of torch)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.user: pyproject.toml constraints.txt | $(VENV)/bin/python
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.user
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
