# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check bench clean

demo: $(VENV)/.installed
	$(BIN)/upq demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not gpu"

check: $(VENV)/.installed
	$(BIN)/ruff check src tests benchmarks tools
	$(BIN)/ruff format --check src tests benchmarks tools
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/stories.py --jobs 2
	$(BIN)/python benchmarks/ablation.py
	$(BIN)/python benchmarks/results.py

# torch first and alone, pinned: left to itself, pip would fetch a CUDA build with gigabytes of libraries.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "UPQ needs Python 3.11 or newer: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[eval,bench,dev]"
	touch $@

clean:
	rm -rf $(VENV) demo runs build
