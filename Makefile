# Every target does its own set-up; a second call installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint benchmarks clean

demo: $(VENV)/.train
	$(BIN)/d2scale demo

test: lint
	# One thread a process: the tests are small, and many start processes of their own.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

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
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/evaluation_speed.py --repeats 1
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/loader_speed.py
	$(BIN)/python benchmarks/training_speed.py

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
