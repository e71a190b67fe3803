# Each target sets up what it needs, once, in .venv; a machine that reaches PyPI is enough.
PYTHON ?= python3
BIN := .venv/bin
export DETECTRON2_DATASETS ?= datasets

.PHONY: demo test test-all lint api clean

demo: .venv/.built  ## train a small attention detector on the built-in dataset, and draw what it sees
	$(BIN)/python tools/demo.py

test: .venv/.built  ## all tests
	$(BIN)/python -m pytest

test-all: .venv/.built  ## the slow ones too, and ten times as many drawn cases
	$(BIN)/python -m pytest -m "slow or not slow" --hypothesis-profile long

lint: .venv/.built  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

api: .venv/.built  ## the reference of all public classes and functions, as pages in output/api
	$(BIN)/python -m pdoc --docformat google --math --output-directory output/api \
		$(addprefix sasa_det.,ops layers modeling config data engine analysis)

clean:  ## everything that the other targets made
	rm -rf .venv build output datasets/sasa_digits* sasa_det.egg-info sasa_det/ops/native/*.so

# detectron2 comes after torch, from a package that has its Python files only: hence the flags. Older
# pips do not pass them on, newer ones refuse the package's optional dependencies.
.venv/.ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet pip==25.3 setuptools==80.10.2 wheel==0.48.0
	$(BIN)/python -m pip install --progress-bar off --requirement requirements.txt
	$(BIN)/python -m pip install --no-build-isolation --no-deps detectron2-cdo==0.5 \
		--config-settings=--global-option=build_py --config-settings=--build-option=--skip-build
	touch $@

# Compiles the kernels, if there is a C compiler.
.venv/.built: .venv/.ready setup.py pyproject.toml $(wildcard sasa_det/ops/native/csrc/*)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@
