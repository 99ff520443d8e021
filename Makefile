# make demo | make test | make check | make results | make bench
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check results bench
.DELETE_ON_ERROR:

demo: $(VENV)/demo
	$(BIN)/python launch.py

# Two processes for the tests of clusters, which wait for half of their time, and two for the others. With bytecode,
# or each of the hundreds of processes that they start compiles the same files.
test: $(VENV)/dev
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 4 --no-loadscope-reorder

check: $(VENV)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/test_rules.py

results: $(VENV)/dev
	$(BIN)/python benchmarks/results.py

bench: $(VENV)/dev
	$(BIN)/python benchmarks/loader.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/nt_xent.py
	$(BIN)/python benchmarks/kmeans.py
	$(BIN)/python benchmarks/micro_batch.py

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "distssl needs Python 3.10 or newer; say make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo: pyproject.toml | $(BIN)/python
	$(BIN)/pip install -e .
	touch $@

$(VENV)/dev: pyproject.toml | $(BIN)/python
	$(BIN)/pip install -e '.[dev]'
	touch $@ $(VENV)/demo
