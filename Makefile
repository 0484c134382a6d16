# `make demo` and `make test` do all the set-up: a virtual environment in .venv with the pinned packages.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: demo test test-slow clean
.DELETE_ON_ERROR:

demo: $(VENV)/demo.stamp
	$(BIN)/burnish demo

test: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHONPATH=.src $(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --maxprocesses 4

test-slow: $(VENV)/dev.stamp
	$(BIN)/pytest -m "slow or gpu"

clean:
	rm -rf $(VENV) build dist burnish-crash .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

$(VENV)/%.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) '.[$(EXTRA)]'
	touch $@

$(VENV)/demo.stamp: EXTRA = cpu
$(VENV)/dev.stamp: EXTRA = dev

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'error: burnish needs Python 3.11 or newer; name one with `make PYTHON=python3.12 ...`' >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
