# Every target sets up its requirements: a virtual environment, PyTorch, this package built from source. No GPU and no
# CUDA toolkit are needed. Settings (make test VENV=~/envs/mine TORCH=torch==2.12.0):
#
#   PYTHON   the Python (>= 3.10) that makes the environment
#   VENV     the environment; it may be an existing one. A torch >= 2.10 in it is kept.
#   PEERS    the environment of test-peers and swap, with the other libraries
#   TORCH    the requirement that pip installs if there is no torch
#   JOBS     number of test processes
#   ARGS     further arguments: make test ARGS="-k dot", make bench ARGS=--help
#   NVCC     the CUDA compiler for cuda-check, if it is not found automatically
#   GPU_PYTHON  the Python for gpu, with torch for CUDA: nothing is installed into it
PYTHON ?= python3
VENV ?= .venv
PEERS ?= $(VENV)-peers
TORCH ?= torch==2.13.0
JOBS ?= 2
ARGS ?=
FUZZ_CASES ?= 10000
GPU_PYTHON ?= python3
export NVCC
# Many images for containers set it. Then every process of the tests would compile its modules, 3 to 10 seconds of torch.
export PYTHONDONTWRITEBYTECODE :=

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:
.DEFAULT_GOAL := help

RUN := $(VENV)/bin/python -m
# Python compiles modules when they are imported; pip would compile all of torch, which takes 20 seconds on one core.
INSTALL := $(RUN) pip --disable-pip-version-check install --no-compile
STAMPS := $(VENV)/.attn_kernels
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
TEST_SOURCES := $(wildcard tests/cpp/*.cpp tests/cpp/*.h)

.PHONY: help setup test test-all test-versions test-peers in-peers test-examples bench swap in-swap examples g2p fuzz cuda-check gpu docs lint format wheel test-wheel clean

help:  ## This list
	@echo 'make TASK, where TASK is one of'
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo 'Settings (VENV, TORCH, ARGS, ...): see the top of the Makefile.'

setup: $(STAMPS)/package  ## Install the package in its own environment, .venv
	@$(RUN) attn_kernels

test: $(STAMPS)/package $(STAMPS)/test $(STAMPS)/optional $(STAMPS)/emulated  ## Tests of every op, backend, dtype and gradient, in minutes
	OMP_NUM_THREADS=1 $(RUN) pytest -n $(JOBS) --dist worksteal -m "not slow" $(ARGS)

test-all: $(STAMPS)/package $(STAMPS)/test $(STAMPS)/optional $(STAMPS)/emulated  ## All tests, including those marked slow (ARGS="-m slow": only these)
	OMP_NUM_THREADS=1 $(RUN) pytest -n $(JOBS) --dist worksteal $(ARGS)

# The interpreter of .venv runs it; each tested combination has its own environment. It can be resumed; results are in
# docs/versions.md.
test-versions: $(STAMPS)/versions  ## Builds and tests with other versions of Python, torch and triton: hours, many GB
	$(RUN) tools.versions $(ARGS)

test-peers:  ## Test patch(model) with the original libraries, in a separate environment
	$(MAKE) VENV=$(PEERS) in-peers

in-peers: $(STAMPS)/package $(STAMPS)/test $(STAMPS)/bench $(STAMPS)/peers
	OMP_NUM_THREADS=1 $(RUN) pytest tests/peers $(ARGS)

test-examples: $(STAMPS)/package $(STAMPS)/test $(STAMPS)/examples  ## Test that the short examples learn, at test size; one minute
	OMP_NUM_THREADS=1 $(RUN) pytest tests/test_examples.py $(ARGS)

bench: $(STAMPS)/package $(STAMPS)/bench  ## The benchmarks: speed against eager, torch.compile and SDPA, with a table
	$(RUN) bench $(ARGS)

swap:  ## patch(model) on models of other libraries: equal output, time and memory, with a table and a plot
	$(MAKE) VENV=$(PEERS) in-swap

in-swap: $(STAMPS)/package $(STAMPS)/bench $(STAMPS)/peers
	$(RUN) bench.models.patched $(ARGS)

examples: $(STAMPS)/package $(STAMPS)/examples  ## The short examples: each trains a model, compares a step, draws a picture
	$(RUN) examples $(ARGS)

# Freed pages stay in the process: fresh pages can cost more than the arithmetic.
g2p: export MALLOC_MMAP_MAX_ := 0
g2p: export MALLOC_TRIM_THRESHOLD_ := 100000000000
g2p: export MALLOC_TOP_PAD_ := 67108864
g2p: $(STAMPS)/package $(STAMPS)/bench  ## A model that writes phonemes: training (45 minutes, resumable) and errors
	$(RUN) examples.g2p train $(ARGS)
	$(RUN) examples.g2p evaluate --word attention --word pronunciation

fuzz: $(STAMPS)/package $(STAMPS)/test $(STAMPS)/emulated  ## The long run of the random tests: FUZZ_CASES=10000 new cases for each backend
	OMP_NUM_THREADS=1 ATTN_KERNELS_FUZZ_CASES=$(FUZZ_CASES) $(RUN) pytest -n $(JOBS) tests/test_fuzz.py $(ARGS)

cuda-check: $(STAMPS)/package $(STAMPS)/bench  ## Compile the GPU kernels without a GPU and check their machine code; needs nvcc
	$(RUN) tools.cuda_check $(ARGS)

gpu:  ## On a machine with a GPU: first contact, tests and times, in stages and without network (docs/gpu.md)
	$(GPU_PYTHON) -m bench.gpu $(ARGS)

# Always from scratch: Sphinx reports no warnings for a page that it does not read again.
docs: $(STAMPS)/torch $(STAMPS)/docs  ## The documentation as a site, build/docs/html/index.html; a warning is an error
	rm -rf build/docs
	$(RUN) sphinx --quiet --fail-on-warning --keep-going -c docs -d build/docs/doctrees . build/docs/html $(ARGS)

lint: $(STAMPS)/torch $(STAMPS)/lint  ## Check format, lint, types and workflows; changes nothing
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(VENV)/bin/clang-format --dry-run --Werror $(SOURCES) $(TEST_SOURCES)
	$(RUN) mypy
	@mkdir -p build
	PYTHONPATH=. PATH="$(abspath $(VENV))/bin:$$PATH" $(RUN) basedpyright --verifytypes attn_kernels --ignoreexternal \
	  >build/types.txt || { cat build/types.txt; exit 1; }
	$(RUN) check_jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(RUN) check_jsonschema --quiet --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/[!c]*.yml
	$(RUN) check_jsonschema --quiet --builtin-schema vendor.citation-file-format CITATION.cff
	$(VENV)/bin/zizmor --offline --quiet .github

format: $(STAMPS)/lint  ## Format Python and C++, and apply ruff's fixes
	$(RUN) ruff check --fix-only .
	$(RUN) ruff format .
	$(VENV)/bin/clang-format -i $(SOURCES) $(TEST_SOURCES)

wheel: $(STAMPS)/torch $(STAMPS)/build  ## Source archive and wheel, in dist/
	rm -rf build/lib* build/temp* build/bdist* dist
	$(RUN) build --no-isolation

# As for test-versions, each tested combination has its own environment: minutes and gigabytes for each torch.
test-wheel: $(STAMPS)/wheel  ## Check the wheel in dist/: its contents, and tests with other versions, without a compiler
	$(RUN) tools.wheel $(ARGS)

clean:  ## Remove build outputs; the environment is kept
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache $(STAMPS)/package
	rm -f attn_kernels/*.so
	find attn_kernels bench examples tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

# The steps of the set-up: each has a stamp file, so that a second call takes no time ----------------------------------

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo 'attn_kernels needs Python >= 3.10: make PYTHON=python3.12 ...' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo 'this Python has no venv module (Debian, Ubuntu: install python3-venv), or name another: make PYTHON=...' >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)

$(STAMPS)/pip: | $(VENV)/bin/python
	@mkdir -p $(STAMPS)
	$(INSTALL) --quiet --upgrade 'pip>=25.1'
	@touch $@

# torch is installed first, alone: later installations find it and never replace it.
$(STAMPS)/torch: | $(STAMPS)/pip
	$(VENV)/bin/python -c 'import sys, torch; sys.exit(torch.__version__ < (2, 10))' 2>/dev/null || $(INSTALL) '$(TORCH)'
	@touch $@

# The dependency groups of pyproject.toml.
$(STAMPS)/build $(STAMPS)/test $(STAMPS)/bench $(STAMPS)/examples $(STAMPS)/versions $(STAMPS)/wheel $(STAMPS)/docs $(STAMPS)/lint: pyproject.toml | $(STAMPS)/torch
	$(INSTALL) --quiet --group $(@F)
	@touch $@

# Not every Python and platform has wheels of these packages: without them their tests are skipped.
$(STAMPS)/optional: pyproject.toml | $(STAMPS)/torch
	@for group in deployment kernels entmax; do \
	  $(INSTALL) --quiet --only-binary :all: --group $$group || echo "left out: the group $$group"; done
	@touch $@

# Other libraries, without their dependencies except torch and those listed with them, because their requirements
# conflict. A library that cannot be installed is left out, and its tests are skipped with the reason. fairseq does not
# build on Python 3.11: its source archive is unpacked, and the tests load two files of it.
$(STAMPS)/peers: tests/peers/requirements.txt | $(STAMPS)/torch
	@grep -v '^\s*\(#\|$$\)' $< | grep -v '^fairseq' | while read -r library; do \
	  $(INSTALL) --quiet --no-deps "$$library" </dev/null || echo "left out: $$library"; done
	@library="$$(grep '^fairseq' $<)" && archive="$$(mktemp -d)" && \
	  $(RUN) pip --disable-pip-version-check download --quiet --no-deps --no-build-isolation --no-binary :all: \
	    --dest "$$archive" "$$library" && \
	  tar -xzf "$$archive"/fairseq-*.tar.gz --strip-components 1 --wildcards \
	    -C "$$($(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" '*/fairseq/*' && \
	  rm -r "$$archive" || echo "left out: $$library"
	@touch $@

# Editable: changed Python files need no new installation; changed sources of the compiled module do.
$(STAMPS)/package: pyproject.toml setup.py $(SOURCES) | $(STAMPS)/torch $(STAMPS)/build
	@[ "$${ATTN_KERNELS_CPU:-1}" = 0 ] || command -v "$${CXX:-c++}" >/dev/null || command -v g++ >/dev/null || { \
	  echo 'no C++ compiler was found (Debian, Ubuntu: install g++; or name one: make CXX=...);' >&2; \
	  echo 'ATTN_KERNELS_CPU=0 make ... goes without the C++ kernels' >&2; exit 1; }
	$(INSTALL) --quiet --no-build-isolation --editable '.[triton]'
	@touch $@

# The CUDA kernels compiled for the CPU (emulator), for tests on a machine without a GPU.
$(STAMPS)/emulated: tests/cpp/build_emulated.py tests/cpp/cuda_emulator.h tests/cpp/cuda_arithmetic.h $(SOURCES) | $(STAMPS)/torch $(STAMPS)/build
	$(VENV)/bin/python tests/cpp/build_emulated.py build/emulated
	@touch $@
