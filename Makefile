# make demo          one real model tuned with three losses, judged, one page (QUICK=1: less of it)
# make test          the tests, without those marked slow
# make test-slow     those that are: they train, or start processes
# make compat        the tests on each TRL from 0.24 on, and docs/compatibility.md
# make soak          faults injected into every command, about an hour; then docs/reliability.md
# make plugins       the tests of the plug-ins, each in an environment with its framework
# make check         lint, format, imports, types
# make docs          the documentation as a site, site/index.html
# make dist          wheel and sdist under dist/, as PyPI takes them
# make clean         remove the environment and caches; results under runs/ stay
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
QUICK ?=
# A worker that crashes ends the run: the others would wait for it for ever. A test that hangs fails.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --max-worker-restart 0 --timeout 1200 --timeout-method thread
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: demo test test-slow soak compat plugins check docs dist install clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.installed
	$(BIN)/plot-align demo $(if $(filter-out 0,$(QUICK)),--quick)

test: $(VENV)/.installed
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.installed
	$(PYTEST) -m slow

soak: $(VENV)/.installed
	$(BIN)/python -m soak; code=$$?; $(BIN)/python -m soak --report && exit $$code

plugins: $(VENV)/.installed
	VENV=$(VENV) tests/plugins/environments.sh

compat: .compat/.built
	$(BIN)/python tests/compat/run.py

.compat/.built: tests/compat/environments.py $(VENV)/.installed
	$(BIN)/python tests/compat/run.py build
	touch $@

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

dist: $(VENV)/.installed
	rm -rf build dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

install: $(VENV)/.installed

# torch comes first and alone: where pip is configured with an index of CPU builds, that index decides.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than Python 3.11, which TRL needs; run make PYTHON=/path/to/python3.11" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install -c constraints.txt $(TORCH)
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .compat .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis src/*.egg-info build dist site
	find src tests benchmarks experiments -name __pycache__ -type d -prune -exec rm -rf {} +
