# Every target makes what it needs; nothing is assumed but Python >= 3.11 and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A spinning OpenMP pool starves the other core on small machines; waiting threads should sleep.
export OMP_WAIT_POLICY ?= passive

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

# constraints.txt pins torch to the CPU build; without it pip would fetch gigabytes of CUDA packages.
$(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info
