# Every target does its own set-up; a second call installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test fuzz lint benchmarks gpu gpu-wheels clean

demo: $(VENV)/.train
	$(BIN)/d2scale demo

test: lint
	# One thread a process: the tests are small, and many start processes of their own.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

# Other wrong values every round, until the time is over: make fuzz MINUTES=60
MINUTES ?= 10
fuzz: $(VENV)/.dev
	end=$$(($$(date +%s) + 60 * $(MINUTES))); \
	while [ $$(date +%s) -lt $$end ]; do \
		D2SCALE_FUZZ=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/fuzz || exit 1; \
	done

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# About half an hour on two cores. The rows that need a GPU are not among them.
benchmarks: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/exactness.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/resume.py
	$(BIN)/python benchmarks/memory_prediction.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/memory_choice.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/memory_finders.py
	$(BIN)/python benchmarks/memory_gpu.py
	$(BIN)/python benchmarks/step_operations.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/evaluation_speed.py --repeats 1
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/loader_speed.py
	$(BIN)/python benchmarks/training_speed.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/tiled_inference.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/data_parallel.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/accumulation.py

# What one GPU can prove, in slices of under ten minutes; the same command goes on where it stopped.
gpu: $(VENV)/.dev
	$(BIN)/python benchmarks/gpu.py

# For a machine of Python 3.12 with torch and torchvision that reaches no package index.
PLATFORMS := manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64 any
gpu-wheels:
	$(PYTHON) -m pip wheel --no-deps -w wheels fvcore iopath
	$(PYTHON) -m pip download --no-deps --only-binary=:all: --python-version 3.12 -d wheels \
		$(PLATFORMS:%=--platform %) -r benchmarks/gpu-wheels.txt

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "d2scale needs Python 3.10 or later: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.train: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[train]'
	touch $@

$(VENV)/.dev: $(VENV)/.train
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[train,dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
