# Every target does its own set-up in .venv, once: it is repeated when pyproject.toml or requirements.txt change.
# Python 3.11 or newer is found by itself; `make test PYTHON=/path/to/python3.12` decides otherwise.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help run test slow check judge clean

VENV := .venv
BIN := $(VENV)/bin
TEXT ?= The train leaves at half past seven.
OUT ?= speech.wav

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' Makefile | expand -t 14

# By default the voice that ships, whatever the machine has; `make run CSM_MODEL=auto` takes CSM-1B where there is a GPU.
# The text goes through the environment, unexpanded: quotes, dollars and backquotes reach the program as they are.
run: export CSM_MODEL ?= bundled
run: export CSM_TEXT := $(value TEXT)
run: $(VENV)/.installed  ## speak TEXT="..." through the emulated endpoint into OUT (speech.wav)
	@$(BIN)/csm deploy try --text "$$CSM_TEXT" -o "$(OUT)"

test: $(VENV)/.installed  ## the tests (CPU, no network, no downloads)
	@$(BIN)/python -m pytest -q

slow: $(VENV)/.installed  ## the slow tests: the 1B configuration, the README's long commands
	@$(BIN)/python -m pytest -q -m "slow and not gpu and not network"

check: $(VENV)/.installed  ## format, lint, types, layout
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/test_layout.py

judge: $(VENV)/.installed  ## the bundled voice before an independent judge (some minutes)
	@$(BIN)/python -m csm_core.train.judge

clean:  ## remove .venv and what tests and builds left
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml requirements.txt
	@for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.14); do \
	    "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; python=; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "Python 3.11 or newer was not found: install it, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; \
	fi; \
	echo "Setting up $(VENV) with $$("$$python" --version) (once; PyTorch is large: about five minutes)"; \
	"$$python" -m venv $(VENV) || { echo "$$python cannot make a venv; on Debian: apt install python3-venv" >&2; exit 1; }
	@$(call pip_install,-r requirements.txt -e '.[dev]')
	@touch $@

# Of pip's output only the downloads that take long (100 MB and more), and its errors.
pip_install = set -o pipefail; $(BIN)/python -m pip install --disable-pip-version-check --no-input --progress-bar off $(1) \
	| { grep --line-buffered -E '[0-9]{3}\.[0-9] MB|Installing collected' || true; } | cut -c 1-110
