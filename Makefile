# `make quickstart` and `make test` do all set-up themselves: they need python3 (3.11 or newer), pip and a package index.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: quickstart test clean

quickstart: $(VENV)/.runtime
	$(BIN)/preftune run quickstart
	@echo "Open runs/quickstart/report.html in a browser."

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/python -m pytest -n 2 --dist loadfile

clean:
	rm -rf $(VENV)

# torch first and alone: a pinned version that is already at hand is then never replaced by a larger build.
$(VENV)/.runtime: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	touch $@

$(VENV)/.test: $(VENV)/.runtime
	$(PIP) --editable '.[test]'
	touch $@
