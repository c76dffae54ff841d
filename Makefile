# make demo    train an adapter on the embedded base and show what it learned
# make test    the whole test suite, without a network
# make check   what CI runs: test, lint, format, types, import contracts, sizes

PYTHON ?= python3
VENV   ?= .venv
# Processes that pytest runs side by side.
JOBS   ?= 2

BIN     := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt

# One thread a process: the workers share the cores, and sums come out in one order.
TEST_ENV := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive

.PHONY: demo test check lint laws golden clean
.DEFAULT_GOAL := check

demo: $(VENV)/.installed
	$(BIN)/inlay train recipes/demo.yaml

test: $(VENV)/.installed-dev
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) -m "not gpu" $(ARGS)

check: test lint

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/size_report.py

laws: $(VENV)/.installed-dev
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) -m "not gpu" tests/laws $(ARGS)

# Writes tests/golden anew: the difference belongs in the review, with its reason.
golden: $(VENV)/.installed-dev
	$(TEST_ENV) INLAY_GOLDEN=write $(BIN)/python -m pytest -m "not gpu" tests/golden $(ARGS)

# A stamp a kind of installation, renewed when what it was made from changes.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[dev]'
	touch $(VENV)/.installed $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
