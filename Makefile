# Every target does its own set-up: `make demo` and `make test` need Python 3.10 or newer, make and git.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: demo test lint peft-suite oldest clean

demo: $(VENV)/.ready
	$(BIN)/python -m plastic_peft.demo

# One thread for each of several processes: where threads share a core they wait for each other.
test: $(VENV)/.ready-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

lint: $(VENV)/.ready-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

peft-suite: $(VENV)/.ready-test
	$(BIN)/python scripts/peft_suite.py

# The lowest versions that setup.cfg claims, for the tests that meet other people's names and interfaces.
oldest: .venv-oldest/.ready-oldest
	.venv-oldest/bin/python -m pytest -m versions

$(VENV)/.ready: setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned set (several minutes the first time)"
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e .
	touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	$(PIP) -c constraints.txt -e ".[test,notebooks]"
	touch $@

$(VENV)/.ready-lint: $(VENV)/.ready
	$(PIP) -c constraints.txt -e ".[lint]"
	touch $@

.venv-oldest/.ready-oldest: setup.cfg pyproject.toml constraints-oldest.txt
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip --disable-pip-version-check install --quiet -c constraints-oldest.txt torch
	.venv-oldest/bin/python -m pip --disable-pip-version-check install --quiet -c constraints-oldest.txt -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest demo_output runs
