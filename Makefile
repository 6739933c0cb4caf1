# The two commands: `make quickstart` and `make test`. Both create .venv and install the project into it first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Index to install torch from, in place of PyPI: on Linux PyPI's wheels bring CUDA, several GB.
# CPU only: make install TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# The lowest versions that pyproject.toml allows, of all but the development tools.
VENV_MIN ?= .venv-min
# For timm's own tests.
TIMM_MODELS ?= vim_tiny adventurer_tiny mambar_small videomamba_tiny arm_base
GPU_WORKERS ?= 14
INSTALLED_MIN := $(VENV_MIN)/.installed
RUN ?= runs/quickstart

# Threads that spin while they wait starve each other where something else runs on the same few cores.
export OMP_WAIT_POLICY ?= passive

.PHONY: help install quickstart test test-min test-gpu mutants sanitize lint types docs docs-check test-timm test-timm-tiny clean

help:
	@echo "make quickstart      train and evaluate a Vision Mamba on digits (a few minutes on two CPU cores), or resume"
	@echo "make test            lint, types, documentation, tests (about ten minutes on two cores)"
	@echo "make install         create $(VENV) and install into it; TORCH_INDEX=URL takes torch from there"
	@echo "make docs            build the documentation in build/site"
	@echo "make docs-check      run all commands of the documentation in a copy of the repository (14 minutes)"
	@echo "make test-min        test with the lowest versions of all dependencies, in $(VENV_MIN) (several GB)"
	@echo "make test-gpu        the tests that need a CUDA device, in $(GPU_WORKERS) processes (193 s on 16 cores)"
	@echo "make mutants         wrong versions of the code, each of which a test must fail (about half an hour)"
	@echo "make sanitize        random calls of the C kernels under gcc's address and undefined-behaviour sanitizers"
	@echo "make test-timm       timm's own model tests on a model per family, with 4 blocks (fetches timm's sources)"
	@echo "make test-timm-tiny  the same with all blocks (six minutes)"

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install --quiet torch torchvision --index-url $(TORCH_INDEX))
	$(BIN)/python -m pip install --quiet --editable '.[quickstart,features,detection,export,demo,lm,docs,dev]'
	@touch $@

$(INSTALLED_MIN): pyproject.toml
	$(PYTHON) -m venv $(VENV_MIN)
	$(VENV_MIN)/bin/python -m pip install --quiet --upgrade pip
	$(VENV_MIN)/bin/python tests/lowest_versions.py > $(VENV_MIN)/lowest.txt
	$(VENV_MIN)/bin/python -m pip install --quiet --constraint $(VENV_MIN)/lowest.txt \
		--editable '.[quickstart,features,detection,export,demo,lm,tracking,dev]'
	@touch $@

install: $(INSTALLED)

quickstart: $(INSTALLED)
	$(BIN)/python tools/prepare_mnist.py data/mnist5k
	$(BIN)/python tools/train.py --config configs/quickstart.yaml --run_dir $(RUN) $(if $(wildcard $(RUN)/config.yaml),--resume)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.ini tests

# Material announces its successor at every build.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-check: $(INSTALLED)
	$(BIN)/python tests/docs_check.py

test: lint types docs
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test-min: $(INSTALLED_MIN)
	$(VENV_MIN)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# Nearly all its time is compilation, on the CPU.
test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu -n $(GPU_WORKERS) --dist worksteal --durations 20

mutants: $(INSTALLED)
	$(BIN)/python tests/mutants/run.py

sanitize: $(INSTALLED)
	$(BIN)/python tests/kernels/sanitize.py --cases 600

test-timm: $(INSTALLED)
	$(BIN)/python tests/timm_suite/run.py $(TIMM_MODELS) --depth 4

test-timm-tiny: $(INSTALLED)
	$(BIN)/python tests/timm_suite/run.py $(TIMM_MODELS)

clean:
	rm -rf $(VENV) $(VENV_MIN) build dist .pytest_cache .mypy_cache .ruff_cache
