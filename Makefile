# make quickstart   a LoQT run of a few minutes on a CPU
# make test         what CI runs: format, lint, types, import contracts, fast tests
# make test-long    all tests
# make clean        remove the environment and caches (runs/ stays)
#
# PYTHON picks the interpreter that .venv is made from: make test PYTHON=python3.12

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
BIN := .venv/bin
RUN_STAMP := .venv/.installed-run
DEV_STAMP := .venv/.installed-dev
# Files, not tests: a file's tests share runs and rank processes. In order: the longest files come first.
SIDE_BY_SIDE := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: quickstart test test-long clean
.DELETE_ON_ERROR:

quickstart: $(RUN_STAMP)
	$(BIN)/python launch/train.py --config configs/quickstart.yaml

test: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -m "not long" $(SIDE_BY_SIDE)

test-long: $(DEV_STAMP)
	$(BIN)/python -m pytest --timeout 1800 $(SIDE_BY_SIDE)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found; run: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv .venv

# The stamps are older than pyproject.toml when the dependencies may have changed. $(BIN)/python is order-only: it is a
# link to the interpreter, whose date means nothing here.
$(RUN_STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(DEV_STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@ $(RUN_STAMP)

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
