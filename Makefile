# Every target starts from a bare clone: it makes .venv first, and installs again when what defines it changes.
#   make train ARGS="--steps 50"      make test ARGS="-k plan"      make test PYTHON=python3.12      make test WORKERS=0
# A .venv keeps the interpreter it was made with: `make clean` before choosing another.

PYTHON ?= python3
RANKS ?= 4
WORKERS ?= 2
ARGS ?=
VENV := .venv

# One thread per rank: ranks and tests share the cores, and OpenMP reads this once, when torch is imported.
export OMP_NUM_THREADS ?= 1

.PHONY: help train test lint docs clean
.DELETE_ON_ERROR:
.NOTPARALLEL:

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1	/p' Makefile

train: $(VENV)/train.stamp ## train the example model on 4 ranks
	$(VENV)/bin/torchrun --standalone --nproc-per-node $(RANKS) examples/pretrain.py --config examples/configs/quick.toml $(ARGS)

test: lint ## lint, then all tests: what CI runs
	# a file's tests stay together and keep their order, so that their fixtures are made once
	$(VENV)/bin/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=15 $(ARGS)

lint: $(VENV)/test.stamp ## ruff and pyright; changes nothing
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

docs: $(VENV)/docs.stamp ## pages and API reference, as one site: build/docs/index.html
	$(VENV)/bin/python -m sphinx --fail-on-warning --keep-going --quiet docs build/docs

clean: ## remove what make and pip made here; keeps runs/
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

$(VENV)/train.stamp: EXTRAS := train
$(VENV)/test.stamp: EXTRAS := train,test
$(VENV)/docs.stamp: EXTRAS := docs
$(VENV)/train.stamp $(VENV)/test.stamp $(VENV)/docs.stamp: pyproject.toml setup.cfg constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --editable ".[$(EXTRAS)]" --constraint constraints.txt
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
	  "Turnout needs Python 3.11 or newer, and '$(PYTHON)' is not: choose another, as in make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
