# Every target installs what it lacks (scripts/setup.sh) and is quick when nothing is missing.
# Needs make, and on Debian or Ubuntu nothing else; elsewhere Python 3.11 or newer and iproute2.
# Variables: PYTHON=python3.12 (interpreter of a new .venv), ARGS="…" (passed on to what a target runs).

SHELL   := /bin/sh
VENV    := .venv/bin
SETUP   := sh scripts/setup.sh
PROGRAM := .venv/.program-ready
DEV     := .venv/.dev-ready
PAGE    := .venv/.page-ready
# Root runs as is; others through sudo, which must not leave root-owned files in the tree.
ROOT    := $(if $(filter 0,$(shell id -u)),,sudo -n env PYTHONDONTWRITEBYTECODE=1)
# As many at a time as tests/conftest.py says.
PYTEST  := $(VENV)/pytest --numprocesses auto
ARGS    ?=
INPUTS  ?= 1200000
MINUTES ?= 0
SECONDS ?= 600
QUICK   ?=

.DEFAULT_GOAL := build
.DELETE_ON_ERROR:
.PHONY: build demo test test-page check fuzz soak bench experiments deb lock clean help

build: $(PROGRAM) ## set up; leaves the program at .venv/bin/mrelay (this is what `make` alone does)
	@echo "ready: .venv/bin/mrelay"

$(PROGRAM): pyproject.toml setup.py requirements.lock scripts/setup.sh $(wildcard bpf/*)
	@$(SETUP) venv
	@touch $@

$(DEV): $(PROGRAM) requirements-dev.lock
	@$(SETUP) dev
	@touch $@

$(PAGE): $(DEV) requirements-page.lock
	@$(SETUP) page
	@touch $@

demo: $(PROGRAM) ## source, relay and receivers in namespaces of their own, live
	@$(SETUP) root ip ethtool smcrouted libbpf.so.1
	@$(ROOT) $(VENV)/mrelay demo $(ARGS)

test: $(DEV) ## all tests; those that build network namespaces run as root
	@$(SETUP) promtool
	@$(SETUP) root ip ethtool tshark libbpf.so.1
	@$(SETUP) wish ffmpeg
ifeq ($(ROOT),)
	$(PYTEST) $(ARGS)
else
	$(PYTEST) -m "not netns" $(ARGS)
	$(ROOT) $(PYTEST) -m netns -p no:cacheprovider $(ARGS)
endif

test-page: $(PAGE) ## the web page, in headless Chromium, which it installs (SCREENSHOTS=docs/page: pictures too)
	@$(SETUP) root ip ethtool chromium libbpf.so.1
	@$(ROOT) env SCREENSHOTS="$(SCREENSHOTS)" $(VENV)/pytest -p no:cacheprovider tests/page $(ARGS)

check: $(DEV) ## lint, format, types, and the tests that need no root
	$(VENV)/ruff check
	$(VENV)/ruff format --check
	$(VENV)/mypy
	$(PYTEST) -m "not netns" $(ARGS)

fuzz: $(DEV) ## every parser and message, coverage-guided: INPUTS=1200000 in total, or about MINUTES=…
	$(VENV)/python tests/fuzz/run.py --inputs $(INPUTS) --minutes $(MINUTES) $(ARGS)
	FUZZ_EXAMPLES=500 $(VENV)/pytest --timeout 1800 tests/fuzz/test_api.py

soak: $(DEV) ## a relay under mixed traffic and trouble for SECONDS=600: plots and a verdict
	@$(SETUP) root ip ethtool libbpf.so.1
	@$(ROOT) $(VENV)/python bench/soak.py --seconds $(SECONDS) $(ARGS)

bench: $(DEV) ## how fast, at what cost, beside other relays; QUICK=1: the main figures, under 5 minutes
	@$(SETUP) root ip ethtool socat smcrouted igmpproxy libbpf.so.1
	@$(ROOT) $(VENV)/python bench/run_bench.py $(if $(QUICK),--quick) $(ARGS)

experiments: $(DEV) ## every experiment: a table of verdicts; fails when a claim no longer holds
	@$(SETUP) root ip ethtool libbpf.so.1
	@$(ROOT) $(VENV)/python experiments/run_all.py $(ARGS)

deb: $(PROGRAM) ## build dist/mrelay_VERSION_ARCH.deb, which brings its own libraries
	@sh packaging/build_deb.sh $(VENV)/python

# The oldest Python we support resolves, so that one file serves all of them.
COMPILE = CUSTOM_COMPILE_COMMAND="make lock" $(VENV)/pip-compile --quiet --generate-hashes --allow-unsafe \
	--strip-extras --no-emit-index-url --no-emit-trusted-host --no-emit-find-links --upgrade

lock: $(DEV) ## renew the requirements*.lock files from pyproject.toml
	@$(VENV)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
	  echo "error: lock with Python 3.11; remedy: make clean && make lock PYTHON=python3.11" >&2; exit 1; }
	$(COMPILE) --build-deps-for editable -o requirements.lock pyproject.toml
	$(COMPILE) --build-deps-for editable --extra dev -c requirements.lock -o requirements-dev.lock pyproject.toml
	$(COMPILE) --extra page -c requirements-dev.lock -o requirements-page.lock pyproject.toml

clean: ## remove .venv and everything else that was built
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist src/*.egg-info src/mrelay/ebpf/*.bpf.o
	find src tests bench experiments scripts -name __pycache__ -type d -exec rm -rf {} +

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 13
