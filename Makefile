# One command each: search, test, lint, types, bench. Each installs what it needs into .venv first, from a bare
# checkout with nothing but Python 3.10 or newer; a second call finds everything there.
#
#   make search                      tune for this machine: its GPU, or else its CPU
#   make search ARGS="--budget 2m"   the same with options
#   make test                        all tests that need no GPU (make test-gpu: those that do)
#   make PYTHON=python3.12 ...       with a Python of your choice
#   make VENV=DIR ...                in another virtual environment

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.PHONY: help search test test-gpu lint types bench install dev clean

VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
JOBS ?= 2

# a command may be there and not run (a version manager's stub), be too old, or lack the venv module
PYTHON ?= $(shell for candidate in python3 python3.13 python3.12 python3.11 python3.10; do \
	if $$candidate -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; \
	then echo $$candidate; break; fi; done)

# Without an NVIDIA GPU: pinned versions whose torch is a CPU build. With one: what the machine has is kept.
HAS_GPU := $(shell if [ -e /dev/nvidia0 ] || nvidia-smi -L >/dev/null 2>&1; then echo yes; fi)
ifeq ($(HAS_GPU),yes)
VENV_FLAGS := --system-site-packages
CONSTRAINTS :=
else
VENV_FLAGS :=
CONSTRAINTS := --constraint constraints-cpu.txt
endif
# --no-compile: Python compiles what it imports; compiling all of torch and its kin first takes as long as the rest
PIP := $(BIN)/python -m pip install --no-compile --quiet --quiet --disable-pip-version-check --prefer-binary $(CONSTRAINTS)

help:
	@sed -n 's/^#   //p' Makefile

install: $(VENV)/.installed
dev: $(VENV)/.installed-dev

$(VENV)/.created:
	@if [ -z "$(PYTHON)" ]; then
	  echo "error: Python 3.10 or newer with its venv module must be installed, but none was found; install one, or name it: make PYTHON=/path/to/python3 ..." >&2
	  exit 3
	fi
	echo "creating $(VENV) with $$($(PYTHON) --version) ($(if $(HAS_GPU),GPU machine: installed packages are kept,no NVIDIA GPU: CPU versions))"
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints-cpu.txt
	@echo "installing sse-tune into $(VENV) (about a minute the first time)"
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.created pyproject.toml constraints-cpu.txt
	@echo "installing sse-tune with its tools for tests into $(VENV) (about a minute the first time)"
	$(PIP) --editable ".[dev]"
	touch $(VENV)/.installed $@

search: $(VENV)/.installed
	@$(BIN)/sse-tune search $(ARGS)

# Triton decides at its import whether it interprets, so those tests are a process of their own. The others go by files,
# some of which compile for minutes before their first test.
test: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not interpret and not gpu" $(ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(JOBS) -m "interpret and not gpu" $(ARGS)

test-gpu: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest -m gpu $(ARGS)

lint: $(VENV)/.installed-dev
	@$(BIN)/ruff check .

types: $(VENV)/.installed-dev
	@$(BIN)/mypy

bench: $(VENV)/.installed
	@$(BIN)/sse-tune bench $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
