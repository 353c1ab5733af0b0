# Every target makes the .venv it needs; a second run finds it ready and starts at once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip -qq --disable-pip-version-check
INPUTS := pyproject.toml constraints.txt
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: help venv demo test slow lint bench wheel

help:
	@echo "make demo    compare cache policies on the shipped model; writes demo-report/"
	@echo "make test    the fast tests"
	@echo "make slow    the slow ones: long workloads, a browser (Chromium must be installed), lm_eval"
	@echo "make lint    ruff and pyright"
	@echo "make bench   the benchmarks (transformers, and llama.cpp where it can be built)"
	@echo "make wheel   a wheel in dist/"
	@echo "make venv    only the environment"

# Torch goes first, alone and by its exact pin, so that no other requirement can pick another build.
$(VENV)/.runtime: $(INPUTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; try: make PYTHON=python3.12" >&2; exit 1; }
	@echo "making $(VENV) (once; torch is large)" >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install $(TORCH)
	@$(PIP) install -c constraints.txt -e .
	@touch $@

$(VENV)/.test: $(VENV)/.runtime
	@$(PIP) install -c constraints.txt -e '.[test]'
	@touch $@

$(VENV)/.slow: $(VENV)/.test
	@$(PIP) install -c constraints.txt -e '.[browser,lm-eval,oracles,parquet,tensorboard]'
	@$(BIN)/python -m trimtab.evaluation.harness.hook install
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/.bench: $(VENV)/.runtime
	@$(PIP) install -c constraints.txt -e '.[bench,oracles]'
	@$(PIP) install -c constraints.txt -e '.[llama]' || \
		echo "llama.cpp could not be built here; its rows are left out" >&2
	@touch $@

venv: $(VENV)/.test $(VENV)/.dev

demo: $(VENV)/.runtime
	@$(BIN)/trimtab compare \
		--plan full --plan streaming --plan kivi:bits=4 --plan kivi:bits=2 --plan h2o --plan snapkv \
		--task perplexity --task needle --task skills --task speed --out demo-report
	@echo "the report: demo-report/report.html" >&2

# One torch thread: the models of the tests are so small that a second one costs more than it brings.
test: $(VENV)/.test
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal

slow: $(VENV)/.slow
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal -m slow

lint: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/pyright

bench: $(VENV)/.bench
	@$(BIN)/python benchmarks/decode.py
	@$(BIN)/python benchmarks/throughput.py
	@$(BIN)/python benchmarks/kvmemory.py

wheel: $(VENV)/.dev
	@$(BIN)/python -m build --wheel --outdir dist
