# Two commands for a fresh machine with Python >= 3.11: `make demo` and `make test`. Each makes .venv first.
#   PYTHON=python3.12          the interpreter that makes .venv
#   TORCH='torch==2.12.1'      another torch: what `pip install` is given, options included (after `make clean`)

.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --disable-pip-version-check --quiet
PIP_OLDEST := $(subst .venv,.venv-oldest,$(PIP))
TOOLS_OLDEST := build hatchling hypothesis pytest pytest-xdist tensorboard

ifdef TORCH
CONSTRAINTS := constraints.txt
else ifneq ($(shell nvidia-smi -L 2>/dev/null),)
TORCH := torch
CONSTRAINTS := constraints.txt
else
# PyPI's torch for Linux is a CUDA build of several GB; the extra index has the CPU build of the same version, which
# pip prefers (2.13.0+cpu sorts after 2.13.0). If it cannot be reached, pip says so and goes on without it.
TORCH := torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu
CONSTRAINTS := constraints-cpu.txt
endif

# Two workers with one thread each: threads that compete for the same two cores are many times slower.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

.PHONY: help venv demo test test-all test-oldest support mutants fix wheel clean

help:
	@echo "make demo | test | test-all | test-oldest | support | mutants | fix | wheel | clean   (CONTRIBUTING.md says what each does)"

venv: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	@echo "Installing into .venv: a minute or two."
	@# --no-deps: the extra index is asked for torch alone; its dependencies come with the next line, from PyPI.
	$(PIP) --retries 1 --no-deps $(TORCH)
	$(PIP) -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@

demo: venv
	$(BIN)/fastexperts demo

test: venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(PYTEST) -m "not slow"

test-all: venv
	$(PYTEST)

# The oldest PyTorch, Triton, transformers, TRL, PEFT and Liger that we serve. Not `dev`, whose Triton is newer; the CPU
# build of torch as above, which brings none.
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	$(PIP_OLDEST) --retries 1 --no-deps torch==2.11.0 --extra-index-url https://download.pytorch.org/whl/cpu
	$(PIP_OLDEST) -c constraints-oldest.txt -e '.[train,peft,plot]' triton $(TOOLS_OLDEST)
	OMP_NUM_THREADS=1 .venv-oldest/bin/pytest -n 2 --dist worksteal -m "not slow"

# xunit1: what a test records has no place in the later format. Failing tests are cells of the page as well.
support: venv
	rm -f .venv/support.xml
	-$(PYTEST) $(wildcard tests/test_families.py tests/test_distributed.py) -o junit_family=xunit1 --junitxml=.venv/support.xml
	$(BIN)/python tests/support_matrix.py .venv/support.xml

mutants: venv
	$(BIN)/python tests/mutants.py

fix: venv
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

wheel: venv
	$(BIN)/python -m build --wheel --no-isolation

clean:
	rm -rf .venv .venv-oldest dist .mypy_cache .ruff_cache .pytest_cache
