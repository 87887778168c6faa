# Everything runs in an environment of its own; PYTHON=python3.12 make ... picks the interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
export OMP_NUM_THREADS ?= 1

.PHONY: help demo install native test lint format types docs gallery bench bench-full bench-peers sanitize gpu-check wheel wheel-check clean

help:
	@echo "make install     make $(VENV) with everything the project needs; make clean: remove what was built"
	@echo "make demo        run the examples"
	@echo "make test        run the tests, README, docs and docstrings included"
	@echo "make lint        ruff; make types: mypy; make format: let ruff rewrite"
	@echo "make docs        build the site into docs/_build/html, warnings are errors; make gallery: its pictures"
	@echo "make bench       the comparison with other libraries, about ten minutes; bench-full: more of it"
	@echo "make bench-peers install what the benchmarks compare with beside PyTorch (BackPACK, curvlinops, JAX, asdex)"
	@echo "make native      compile the native library in place again"
	@echo "make sanitize    the kernels under ASan and UBSan, those for CUDA on the CPU"
	@echo "make gpu-check   everything on this machine's GPU against the CPU, with timings"
	@echo "make wheel       build dist/*.whl and the sdist"
	@echo "make wheel-check install the wheel beside the newest torch (TORCH=2.14.1: that one) and test it there"

$(VENV)/installed: pyproject.toml requirements/build.txt requirements/constraints.txt $(wildcard setup.py)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements/build.txt
	$(BIN)/python -m pip install --no-build-isolation -c requirements/constraints.txt -e ".[dev]"
	touch $@

install: $(VENV)/installed

demo: install
	OMP_NUM_THREADS=2 $(BIN)/python examples/quickstart.py
	OMP_NUM_THREADS=2 $(BIN)/python examples/train_digits.py

native: install
	$(BIN)/python setup.py build_ext --inplace

test: install
	$(BIN)/python -m pytest -n $(JOBS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: install
	$(BIN)/mypy

gallery: install
	OMP_NUM_THREADS=2 $(BIN)/python docs/generate_gallery.py

docs: install
	$(BIN)/python -m sphinx -W --keep-going -n -b html docs docs/_build/html

bench: install
	$(BIN)/python -m benchmarks

bench-full: install
	$(BIN)/python -m benchmarks --full

bench-peers: install
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .peers -r requirements/bench-torch.txt
	$(PYTHON) -m venv .venv-jax
	.venv-jax/bin/python -m pip install --quiet -r requirements/bench-jax.txt

sanitize: install
	PYTHON=$(CURDIR)/$(BIN)/python tests/native/sanitizers.sh

gpu-check: install
	$(BIN)/python -m benchmarks.gpu_check

wheel: install
	rm -rf build/lib* build/bdist*
	$(BIN)/python -m build --no-isolation

wheel-check: install
	PYTHON=$(CURDIR)/$(BIN)/python tests/native/wheel_check.sh $(TORCH)

clean:
	rm -rf build dist docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache
