# Every target makes .venv itself (Python 3.11, else 3.12), installs the pinned requirements and goes on; the
# install is skipped while setup.py and the pins are unchanged. Another interpreter: make PYTHON=/path/to/python demo
#
#   make demo       sound files -> data -> base -> SFT -> GRPO -> evaluation -> report; run again, it continues
#   make test       everything fast
#   make test-slow  the long tests only
#   make lint       ruff (lint and format) and mypy
#   make format     let ruff rewrite what it can

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:

PYTHON ?= $(shell for p in python3.11 python3.12; do \
	if $$p -c 'import ensurepip, venv' >/dev/null 2>&1; then echo $$p; break; fi; done)
VENV := .venv
PY := $(VENV)/bin/python
PINS := .ci/constraints.txt
# Test processes at once, and what else to hand to pytest: make test WORKERS=1 ARGS="-k tokenizer"
WORKERS ?= 2
ARGS ?=

# The name of a stamp holds a checksum of what was installed, so a changed requirement is a missing stamp.
WANTED := $(shell cat setup.py $(PINS) | cksum | cut -d' ' -f1)
RUN_STAMP := $(VENV)/.installed-run-$(WANTED)
TEST_STAMP := $(VENV)/.installed-test-$(WANTED)
PIP := $(PY) -m pip --disable-pip-version-check --quiet --no-input

.PHONY: help demo test test-slow lint format venv-run venv-test
help:
	@sed -n 's/^#   //p' Makefile

demo: $(RUN_STAMP)
	@$(PY) -m launch.demo $(ARGS)

test: $(TEST_STAMP)
	@JAX_PLATFORMS=cpu $(PY) -m pytest -m "not slow" -n $(WORKERS) --dist loadfile $(ARGS)

test-slow: $(TEST_STAMP)
	@JAX_PLATFORMS=cpu $(PY) -m pytest -m slow -n $(WORKERS) --dist loadfile $(ARGS)

LINTED := $(wildcard echo_jax configs launch data eval tests benchmarks setup.py)
# Tests are run, which checks them better than their types would.
TYPED := $(filter-out tests setup.py,$(LINTED))
lint: $(TEST_STAMP)
	@$(PY) -m ruff check $(LINTED)
	@$(PY) -m ruff format --check $(LINTED)
	@$(PY) -m mypy $(TYPED)

format: $(TEST_STAMP)
	@$(PY) -m ruff check --fix $(LINTED)
	@$(PY) -m ruff format $(LINTED)

venv-run: $(RUN_STAMP)
venv-test: $(TEST_STAMP)

# A .venv that an interrupted run or a moved folder has broken is made anew.
define make_venv
if ! $(PY) -m pip --version >/dev/null 2>&1; then \
  if [ -z "$(PYTHON)" ]; then \
    echo "make: no Python 3.11 or 3.12 with the venv module found: install one, or name it: make PYTHON=/path/to/python $(MAKECMDGOALS)" >&2; exit 1; fi; \
  "$(PYTHON)" -c 'import sys; v = sys.version_info[:2]; v in ((3, 11), (3, 12)) or sys.exit(f"make: PYTHON is Python {v[0]}.{v[1]}, need 3.11 or 3.12")'; \
  "$(PYTHON)" -m venv --clear $(VENV); fi
endef

define install
echo "Installing the pinned requirements into $(VENV) (some minutes the first time)"; \
$(PIP) install --constraint $(PINS) pip setuptools; \
$(PIP) install --constraint $(PINS) --no-build-isolation --use-pep517 --editable ".[$(EXTRAS)]"
endef

$(RUN_STAMP): EXTRAS := data,launch
$(RUN_STAMP):
	@$(make_venv)
	@rm -f $(VENV)/.installed-run-*
	@$(install)
	@touch $@

# [test] holds everything that [data] and [launch] hold.
$(TEST_STAMP): EXTRAS := test
$(TEST_STAMP):
	@$(make_venv)
	@rm -f $(VENV)/.installed-*
	@$(install)
	@touch $@ $(RUN_STAMP)
