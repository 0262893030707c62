# Every target makes what it needs; nothing is assumed but Python >= 3.11 and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Waiting OpenMP threads spin for tens of microseconds, then sleep: long spins starve the other core of small machines,
# none at all would cost small products more than they take.
export GOMP_SPINCOUNT ?= 10000
# On Linux, plain pip may choose a torch build with gigabytes of CUDA packages. Point it at a CPU build if you have one:
#   make demo PIP_ARGS="--find-links /folder/with/cpu/wheels"
PIP_ARGS ?=

.PHONY: demo demo-llm test check bench claims docs clean

demo: $(VENV)/.demo
	$(BIN)/gossamer demo

demo-llm: $(VENV)/.demo
	$(BIN)/gossamer demo llm

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright gossamer/core
	$(BIN)/python -m pytest tests

check: test

bench: $(VENV)/.test
	$(BIN)/python -m benchmarks.run

claims: $(VENV)/.test
	$(BIN)/python -m claims.run

docs: $(VENV)/.docs
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --strict

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# constraints.txt pins what was tested; without it pip takes the newest torch, whatever it brings along.
$(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info
