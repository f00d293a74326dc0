# Thin: each line calls a script or run.py. `make` alone lists what there is.
SCALE ?= cpu
WORKERS ?= 2
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: help setup quickstart test lint tables figures bench clean
.DEFAULT_GOAL := help

help:
	@echo "make setup                                 .venv with everything pinned"
	@echo "make quickstart                            setup if needed, then Table 2.1 at scale=quick"
	@echo "make test                                  linter, type checker, the whole test suite"
	@echo "make table-2.1 [SCALE=cpu] [WORKERS=2]     run what is missing, then render and print"
	@echo "make bench [ARGS=--quick]                  what a training step costs, to results/bench.md"
	@echo "make figure-2.1 [SCALE=cpu] [WORKERS=2]    likewise a figure"
	@echo "make tables figures [SCALE=cpu]            render every table and figure from records; trains nothing"

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) > /dev/null || { echo "error: $(PYTHON) not found; install Python 3.11, or name yours: make setup PYTHON=python3"; exit 1; }
	@echo "Installing gradexp and its pinned dependencies into .venv (a few minutes, a few GB) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
	@echo "Done. Activate it with: source .venv/bin/activate"

quickstart: setup
	@$(BIN)/python scripts/make_table.py 2.1 --scale quick --workers $(WORKERS)

test: setup lint
	@$(BIN)/python -m pytest

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

table-%: setup
	@$(BIN)/python scripts/make_table.py $* --scale $(SCALE) --workers $(WORKERS)

figure-%: setup
	@$(BIN)/python scripts/make_figure.py $* --scale $(SCALE) --workers $(WORKERS)

tables: setup
	@$(BIN)/python scripts/make_table.py --scale $(SCALE) --render-only

figures: setup
	@$(BIN)/python scripts/make_figure.py --scale $(SCALE) --render-only

bench: setup
	@$(BIN)/python scripts/bench.py $(ARGS)

clean:
	@rm -rf outputs
