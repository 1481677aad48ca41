# SPDX-License-Identifier: Apache-2.0
# DEVICE=cpu|gpu chooses the requirements. TORCH_INDEX names a further wheel index: plain torch for Linux is the large CUDA build, and
# PyTorch's own index of CPU wheels holds a small one. An environment is made for one device: their FBGEMM builds cannot share one.
DEVICE ?= cpu
VENV ?= .venv
PYTHON ?= python3
TORCH_INDEX ?=

ifeq ($(filter cpu gpu,$(DEVICE)),)
$(error DEVICE=$(DEVICE): expected cpu or gpu)
endif

BIN := $(VENV)/bin
CONSTRAINTS := requirements/constraints-$(DEVICE).txt
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c $(CONSTRAINTS) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
RUN_STAMP := $(VENV)/.stamp-$(DEVICE)
DEV_STAMP := $(VENV)/.stamp-dev-$(DEVICE)
OTHER_STAMP := $(VENV)/.stamp-$(if $(filter cpu,$(DEVICE)),gpu,cpu)
# The environment is older than its recipe whenever one of these is newer than its stamp.
RECIPE := pyproject.toml $(CONSTRAINTS) requirements/$(DEVICE).txt $(wildcard vendor/*/pyproject.toml)

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
# One file, so its tests are shared out one by one.
INTERPRETER := --dist load tests/kernels/interpreter

.DEFAULT_GOAL := help
.PHONY: help setup dev run serve test test-all test-kernels tune lint bench peers check-gpu-set audit clean

help: ## list what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(RUN_STAMP) ## install into .venv (DEVICE=cpu|gpu, TORCH_INDEX=URL for the small CPU build of torch)

dev: $(DEV_STAMP) ## install what tests, linting and notebooks need as well

run: setup ## the quickstart: from raw events to a served bundle
	$(BIN)/recsys run quickstart

serve: setup ## serve the champion
	$(BIN)/recsys serve

test: dev ## the tests, without the slow ones; Triton kernels in a process of their own, interpreted
	$(PYTEST) -m "not slow"
	TRITON_INTERPRET=1 $(PYTEST) -m "not slow" $(INTERPRETER)

test-all: dev ## all tests
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) $(INTERPRETER)

test-kernels: dev ## everything of the kernels: all shapes and architectures, all courses of training, then interpreted
	$(PYTEST) tests/kernels tests/recsys/ranking/test_convergence.py tests/recsys/retrieval/test_convergence.py
	TRITON_INTERPRET=1 $(PYTEST) $(INTERPRETER)

tune: dev ## measure which implementation of each op is the fastest here, and write kernels/paths.json
	$(BIN)/python -m kernels.tune

lint: dev ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tools

bench: dev ## all benchmarks, the short way
	$(BIN)/python -m benchmarks --quick

peers: dev ## make the environments of the frameworks that benchmarks compare with, in .peers
	$(BIN)/python -m benchmarks.peers

check-gpu-set: ## check from metadata alone that the GPU requirements fit together, and pin them
	$(PYTHON) tools/check_gpu_set.py --write requirements/constraints-gpu.txt

audit: dev ## look for known vulnerabilities of the pinned packages; says what could not be looked up
	$(BIN)/python tools/audit.py $(CONSTRAINTS)

clean: ## remove the environments, caches and builds (not the runs)
	rm -rf $(VENV) .peers .cache build *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(RUN_STAMP): $(RECIPE) | $(BIN)/python
	@test ! -e $(OTHER_STAMP) || { echo "$(VENV) was made for another device: make clean, or name a new VENV=" >&2; exit 2; }
	$(PIP) -r requirements/$(DEVICE).txt
	@touch $@

# What developers need holds what runs, so one call of pip makes both stamps.
$(DEV_STAMP): $(RECIPE) requirements/dev-$(DEVICE).txt | $(BIN)/python
	@test ! -e $(OTHER_STAMP) || { echo "$(VENV) was made for another device: make clean, or name a new VENV=" >&2; exit 2; }
	$(PIP) -r requirements/dev-$(DEVICE).txt
	@touch $(RUN_STAMP) $@
