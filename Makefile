# Thin: each line calls a script or run.py. `make` alone lists what there is.
SCALE ?= cpu
WORKERS ?= 2
LAUNCHER ?= local
SET ?=
BUDGET ?=
RUN_SET = $(filter-out launcher.%,$(SET))
PYTHON ?= python3.11
BIN := .venv/bin

# With a budget, runs are chosen by scripts/reproduce.py, and tables and figures are rendered from what is there afterwards.
RENDER = $(if $(BUDGET),--render-only)

.PHONY: help setup quickstart test lint tables figures reproduce claims plan report verify bench gpu-check clean
.DEFAULT_GOAL := help

help:
	@echo "make setup                                 .venv with everything pinned"
	@echo "make quickstart                            setup if needed, then Table 2.1 at scale=quick"
	@echo "make test [WORKERS=2]                      linter, type checker, the whole test suite"
	@echo "make table-2.1 [SCALE=cpu] [WORKERS=2]     run what is missing, then render and print"
	@echo "     LAUNCHER=slurm SET='KEY=VALUE ...'    on a cluster; hardware settings, such as trainer.precision=32"
	@echo "make verify [ARGS='--sample 3']            whether records are intact, and quick ones repeat"
	@echo "make bench [ARGS=--quick|'--part maps']    what a training step costs, to results/bench"
	@echo "make figure-2.1 [SCALE=cpu] [WORKERS=2]    likewise a figure"
	@echo "make tables figures [SCALE=cpu]            render every table and figure from records; trains nothing"
	@echo "make plan [SCALE=cpu]                      what is missing, and its hours, memory and disk on this machine"
	@echo "make reproduce [SCALE=cpu] [WORKERS=2]     everything that is missing, then tables, figures, claims, report"
	@echo "     BUDGET=2h                             also with a table or figure: the runs that fit, most wanted first"
	@echo "make gpu-check                             whether this GPU computes what the CPU does, and how fast; 5 minutes"
	@echo "make claims [SCALE=cpu]                    tests the thesis's claims on our records"
	@echo "make report [SCALE=cpu]                    one HTML page of all of it, each number with its record"
	@echo "make clean                                 says what deleting outputs/ would cost; CONFIRM=yes deletes it"

# Does what fits into BUDGET; `code` is then its exit code.
spend = $(BIN)/python scripts/reproduce.py $(1) --budget $(BUDGET) --scale $(SCALE) --workers $(WORKERS) --launcher $(LAUNCHER) --set $(SET); code=$$?; [ $$code -le 1 ] || exit $$code

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
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

table-%: setup
	@$(if $(BUDGET),$(call spend,"table $*"),code=0); \
	$(BIN)/python scripts/make_table.py $* --scale $(SCALE) --workers $(WORKERS) --launcher $(LAUNCHER) $(RENDER) --set $(SET) && exit $$code

figure-%: setup
	@$(if $(BUDGET),$(call spend,"figure $*"),code=0); \
	$(BIN)/python scripts/make_figure.py $* --scale $(SCALE) --workers $(WORKERS) --launcher $(LAUNCHER) $(RENDER) --set $(SET) && exit $$code

tables: setup
	@$(BIN)/python scripts/make_table.py --scale $(SCALE) --render-only --set $(SET)

figures: setup
	@$(BIN)/python scripts/make_figure.py --scale $(SCALE) --render-only --set $(SET)

plan: setup
	@$(BIN)/python scripts/plan.py --scale $(SCALE) --set $(RUN_SET)

# What is missing of every table and figure, then all of the pages; goes on where something failed, and says so at the end.
reproduce: setup
	@$(if $(BUDGET),$(call spend,),code=0); for what in table figure; do \
		$(BIN)/python scripts/make_$$what.py --scale $(SCALE) --workers $(WORKERS) --launcher $(LAUNCHER) $(RENDER) --set $(SET) || code=1; \
	done; $(BIN)/python scripts/make_claims.py --scale $(SCALE) --set $(RUN_SET) && $(BIN)/python scripts/make_report.py --scale $(SCALE) --set $(RUN_SET) && exit $$code

claims: setup
	@$(BIN)/python scripts/make_claims.py --scale $(SCALE) --set $(RUN_SET)

report: setup
	@$(BIN)/python scripts/make_report.py --scale $(SCALE) --set $(RUN_SET)

verify: setup
	@$(BIN)/python scripts/verify.py $(ARGS)

bench: setup
	@$(BIN)/python scripts/make_bench.py $(ARGS)

gpu-check: setup
	@$(BIN)/python scripts/gpu_check.py $(ARGS)

clean:
	@du -sh outputs 2> /dev/null || { echo "outputs/ does not exist; there is nothing to delete"; exit 0; }; \
	echo "outputs/ holds checkpoints, trained weights, saliency maps and caches; runs that depend on them would train them again."; \
	echo "Records and tables (results/) stay."; \
	if [ "$(CONFIRM)" = yes ]; then rm -rf outputs && echo "Deleted."; else echo "To delete it: make clean CONFIRM=yes"; fi
