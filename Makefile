# One way in for people and machines: every target installs what it needs first.
#   make demo     sample corpus -> tokenizer -> shards -> models -> report
#   make test     contracts and tests; ends in pytest's closing line
#   make lint     contracts, style, types; no tests
#   make check    all of it: lint, then the tests
#   make bench    every benchmark, in its quick form
#   make install  only the environment, in .venv
#   make clean    remove what builds and tools left (not .venv, runs, reports or data)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# The first Python 3.11 or 3.12 there is; PYTHON=... chooses another.
PYTHON ?= $(shell for name in python3.12 python3.11 python3 python; do \
	$$name -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null \
	&& echo $$name && break; done)
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
UV := .build/uv/bin/uv
LINKS := .build/links
ROOMS := configs kernels data_pipeline trainer eval launcher
BENCHMARKS := data packing loading cleaning memory speed checkpoints restart
# Anything that decides what is installed; a change installs again.
STAMP := $(VENV)/.installed-$(shell cat setup.cfg pyproject.toml overrides.txt constraints.txt Makefile | cksum | cut -d ' ' -f 1)

.PHONY: help install demo test lint check contracts bench clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

install: $(STAMP)

demo: $(STAMP)
	@$(BIN)/shoal demo

test: contracts
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=$(LINKS) $(BIN)/mypy -p shoal

check: lint test

contracts: $(STAMP) $(LINKS)
	@PYTHONPATH=$(LINKS) $(BIN)/lint-imports

bench: $(STAMP)
	@for name in $(BENCHMARKS); do \
		echo "== $$name"; \
		$(BIN)/python -m benchmarks.$$name --quick; \
	done

clean:
	rm -rf .build build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache \
		.import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# Tools that cannot follow package_dir see the rooms under one folder named shoal.
$(LINKS): Makefile
	@mkdir -p $(LINKS)/shoal
	@for room in $(ROOMS); do ln -sfn $(CURDIR)/$$room $(LINKS)/shoal/$$room; done
	@touch $(LINKS)

# uv resolves this set in seconds where pip backtracks for minutes. It does not read pip's own
# configuration, so what pip is told about index and certificates is handed on, at run time only.
$(STAMP):
	@test -n '$(PYTHON)' || { echo 'error: Python 3.11 or 3.12 is needed; make PYTHON=/path/to/python'; exit 4; }
	@setting() { $(PYTHON) -m pip config get "global.$$1" 2>/dev/null || true; }; \
	index=$${PIP_INDEX_URL:-$$(setting index-url)}; \
	cert=$${PIP_CERT:-$$(setting cert)}; \
	if [ -n "$$index" ]; then export UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$$index}"; fi; \
	if [ -n "$$cert" ]; then export SSL_CERT_FILE="$${SSL_CERT_FILE:-$$cert}"; fi; \
	echo 'installing into $(VENV) (once; about 7 GB with the GPU libraries of torch)'; \
	test -x $(UV) || $(PYTHON) -m pip install --quiet --root-user-action=ignore --target .build/uv 'uv>=0.5'; \
	test -x $(BIN)/python || $(UV) venv --quiet --seed --python "$$(command -v $(PYTHON))" $(VENV); \
	$(UV) pip install --quiet --python $(BIN)/python --compile-bytecode \
		--override overrides.txt --constraint constraints.txt --editable '.[dev]'
	@rm -f $(VENV)/.installed-*
	@touch $@
