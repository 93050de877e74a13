# Two commands do everything on a fresh machine: `make demo` and `make test`. All targets are idempotent.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: setup demo test test-all check bench clean

setup: .venv/.core          ## .venv with the library and its command-line tool
demo: setup                 ## train on Python's standard library, evaluate, complete a line (about 5 minutes)
	$(BIN)/python examples/demo.py
test: .venv/.test           ## the contracts (under 10 minutes)
	$(BIN)/python -m pytest -n auto
test-all: .venv/.test       ## everything, the slow ones too (under 60 minutes)
	$(BIN)/python -m pytest -n auto -m ""
check: .venv/.dev           ## lint, format, types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright
bench: setup                ## training speed beside a Llama of equal size
	$(BIN)/resonance bench speed
clean:
	rm -rf .venv

.venv/bin/python:
	$(PYTHON) -m venv .venv
.venv/.core: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing resonance-nn into .venv (a few minutes the first time) ..."
	$(PIP) -e . && touch $@
.venv/.test: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing resonance-nn[test] into .venv (a few minutes the first time) ..."
	$(PIP) -e ".[test]" && touch $@ .venv/.core
.venv/.dev: .venv/bin/python pyproject.toml constraints.txt
	@echo "Installing resonance-nn[dev] into .venv (a few minutes the first time) ..."
	$(PIP) -e ".[dev]" && touch $@ .venv/.test .venv/.core
