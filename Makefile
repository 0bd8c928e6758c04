# Every target uses the checkout's own virtual environment.
PYTHON ?= $(shell for p in python3.12 python3.13 python3.11 python3; do command -v $$p >/dev/null && \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-slow test-newest check docs lock lock-newest clean

demo: $(VENV)/.package  ## run the whole loop on the models that ship with the package
	$(BIN)/sdjax demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n 2

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -q -m slow

# The newest supported JAX, on Python 3.12 or 3.13: PYTHON= names the interpreter, TESTS= what to run.
# Without torch, so the parity tests are skipped.
NEWEST_VENV ?= .venv-newest
NEWEST_PYTHON = $(if $(filter file,$(origin PYTHON)),$(shell .ci/newest-python),$(PYTHON))
NEWEST_PIP := $(NEWEST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check
NEWEST_PACKAGES := --editable . pytest pytest-xdist beartype import-linter
TESTS ?= tests

test-newest: $(NEWEST_VENV)/.test  ## run the tests on the newest supported JAX
	SDJAX_NO_TORCH=1 $(NEWEST_VENV)/bin/python -m pytest -q -n 2 $(TESTS)

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy sdjax
	$(BIN)/lint-imports
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

docs: $(VENV)/.test  ## build the documentation into site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/.venv:
	@test -n "$(PYTHON)" || { echo "sdjax needs Python 3.11 or newer: set PYTHON=" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.package: $(VENV)/.venv pyproject.toml requirements.lock
	$(PIP) --constraint requirements.lock --editable .
	@touch $@

# torch is only the reference of the parity tests. It is installed separately, since requirements.lock
# does not pin its many dependencies.
$(VENV)/.test: $(VENV)/.package
	$(PIP) torch==2.13.0
	$(PIP) --constraint requirements.lock --editable '.[test,docs,examples]'
	@touch $@

$(NEWEST_VENV)/.test: pyproject.toml requirements-newest.lock
	@test -n "$(NEWEST_PYTHON)" || { echo "test-newest needs Python 3.12 or 3.13: set PYTHON=" >&2; exit 2; }
	@$(NEWEST_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
		{ echo "test-newest needs Python 3.12 or 3.13, not $(NEWEST_PYTHON): set PYTHON=" >&2; exit 2; }
	test -d $(NEWEST_VENV) || $(NEWEST_PYTHON) -m venv $(NEWEST_VENV)
	$(NEWEST_PIP) --constraint requirements-newest.lock $(NEWEST_PACKAGES)
	@touch $@

lock: $(VENV)/.test  ## pin the installed versions
	$(BIN)/python -m pip freeze --exclude-editable | grep -v '^torch==' > requirements.lock

lock-newest:  ## pin the newest versions that pyproject.toml allows
	rm -rf $(NEWEST_VENV)
	$(NEWEST_PYTHON) -m venv $(NEWEST_VENV)
	$(NEWEST_PIP) $(NEWEST_PACKAGES)
	$(NEWEST_VENV)/bin/python -m pip freeze --exclude-editable > requirements-newest.lock

clean:
	rm -rf $(VENV) $(NEWEST_VENV) build site *.egg-info
