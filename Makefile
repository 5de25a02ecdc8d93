# From a fresh clone, with python3 (3.11 or newer), a C++ compiler and make:
#   make bench   install, build, run the benchmark        make test    install, build, run the tests
#   make lint    check style and types                    make clean   remove what was built
#   make gpu-check   on a machine with a GPU: what only a GPU can show
#   make docs        the documentation, into build/docs, and its examples run
#   make proof       with nvcc: what can be proven without a GPU, into docs/proof.md, in half an hour
# Pass options with ARGS, choose an interpreter with PYTHON: make test ARGS="-k gru" PYTHON=python3.12
PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=

PY  := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input
CPP  = find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh'

.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help bench docs gpu-check test proof lint build clean distclean

help:
	@sed -n '/^#/!q; s/^# //p' $(firstword $(MAKEFILE_LIST))

bench: build $(VENV)/.installed-bench
	$(PY) -m benchmarks $(ARGS)

gpu-check: build $(VENV)/.installed-bench
	$(PY) -m benchmarks.gpu_check $(ARGS)

docs: build $(VENV)/.installed-docs
	$(PY) -m sphinx -q -W --keep-going -b html docs build/docs $(ARGS)
	$(PY) -m sphinx -q -W -b doctest docs build/doctest

test: export FUSEDRNN_TESTING = 1
test: export FUSEDRNN_EMULATOR = 1
test: build $(VENV)/.installed-test
	$(PY) -m pytest $(ARGS)

proof: export FUSEDRNN_TESTING = 1
proof: export FUSEDRNN_EMULATOR = 1
proof: build $(VENV)/.installed-test
	$(PY) -m tests.proof $(ARGS)

lint: build $(VENV)/.installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(CPP) | xargs -r $(VENV)/bin/clang-format --dry-run -Werror

# Always asked, done in a second where nothing changed: Ninja knows what is out of date.
build: $(VENV)/.installed-tools
	$(PY) setup.py --quiet build_ext --inplace

$(VENV)/.installed-tools: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "fusedrnn needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | tail -1)." \
	       "Name another: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt --upgrade pip
	$(PIP) install -c constraints.txt torch setuptools cmake ninja pybind11
	@touch $@

$(VENV)/.installed-%: $(VENV)/.installed-tools pyproject.toml setup.py
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[$*]'
	@touch $@

clean:
	rm -rf build dist *.egg-info fusedrnn/lib .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
