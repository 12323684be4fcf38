# Everything a developer or a newcomer does, one verb each. Every verb makes the environment it needs, in .venv, from pyproject.toml.
#
#   make demo     ask a small real model a question, shared out to a root and two workers
#   make test     style, types, tests: what CI runs
#   make style | types | tests | format | clean
#
# PYTHON names the interpreter (3.11 or later); ARGS is passed on to pytest: make tests ARGS="tests/text -k decode".

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install
export PIP_ROOT_USER_ACTION := ignore

.PHONY: help demo test style types tests format clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/.run
	@$(BIN)/dairllm demo

test: style types tests

style: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

tests: $(VENV)/.dev
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist worksteal $(ARGS)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# What these files say is in the environment; each is made anew when pyproject.toml has changed.
$(VENV)/.run: pyproject.toml | $(BIN)/python
	@echo "installing dairllm into $(VENV) (400 MB, some minutes the first time)" >&2
	@$(PIP) --editable '.[convert]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@echo "installing dairllm and the tools of its tests into $(VENV) (500 MB, some minutes the first time)" >&2
	@$(PIP) --editable '.[dev]'
	@touch $@

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "dairllm needs Python 3.11 or later, and no python3 on the PATH is: $$(python3 --version 2>&1 | head -n 1)." \
		"Install one, or name it: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "dairllm needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) --version 2>&1 | head -n 1)." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make a virtual environment: its modules venv" \
		"and ensurepip are missing (Debian, Ubuntu: apt install python3-venv)." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
