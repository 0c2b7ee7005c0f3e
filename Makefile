# Every target does its own set-up. Needed on the machine: python3.11, pip, make, g++.

PYTHON ?= python3.11
BUILD := build
BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## install Millrace and its tools into .venv

$(INSTALLED): pyproject.toml constraints.txt
	@mkdir -p $(BUILD)
	@echo "Installing Millrace into .venv: a minute or two, once (log: $(BUILD)/setup.log)"
	@{ $(PYTHON) -m venv .venv \
	  && $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt setuptools \
	  && $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'; \
	} > $(BUILD)/setup.log 2>&1 || { tail -n 20 $(BUILD)/setup.log; exit 1; }
	@touch $@

demo: $(INSTALLED) ## run the bundled job (invoice lines to JSON) through Ray Data, and score it
	@$(BIN)/millrace run examples/invoices/job.yaml --output $(BUILD)/invoices --overwrite
	@$(BIN)/python examples/invoices/score.py $(BUILD)/invoices --at-least 0.98

# -P keeps the checkout off sys.path, where its folder `kernels` would stand for another project's package.
test: $(INSTALLED) ## run all tests (those for a GPU only where there is one)
	@$(BIN)/python -P -m pytest

check: $(INSTALLED) ## lint, formatting and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@mkdir -p $(BUILD)/mypy && ln -sfn ../.. $(BUILD)/mypy/millrace
	@$(BIN)/mypy

bench: $(INSTALLED) ## run the benchmarks on this machine, one JSON line a case
	@for file in benchmarks/*.py; do $(BIN)/python $$file || exit 1; done

clean: ## remove .venv and everything that was built
	rm -rf .venv $(BUILD) dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
