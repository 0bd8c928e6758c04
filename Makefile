# Everything happens in a virtual environment of the checkout's own.
PYTHON ?= $(shell for p in python3.12 python3.13 python3.11 python3; do command -v $$p >/dev/null && \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-slow check lock clean

demo: $(VENV)/.package  ## the whole loop on the tiny models that ship
	$(BIN)/sdjax demo

test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n 2

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -q -m slow

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy sdjax

$(VENV)/.venv:
	@test -n "$(PYTHON)" || { echo "sdjax needs Python 3.11 or newer: set PYTHON=" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.package: $(VENV)/.venv pyproject.toml requirements.lock
	$(PIP) --constraint requirements.lock --editable .
	@touch $@

# torch first and by itself: it is the reference that the parity tests compare with, nothing more.
$(VENV)/.test: $(VENV)/.package
	$(PIP) torch==2.13.0
	$(PIP) --constraint requirements.lock --editable '.[test]'
	@touch $@

lock: $(VENV)/.test  ## pins what is installed now
	$(BIN)/python -m pip freeze --exclude-editable | grep -v '^torch==' > requirements.lock

clean:
	rm -rf $(VENV) build *.egg-info
