# Everything is done in .venv/, inside this checkout.  `make help` lists it.

PYTHON ?= python3
# Its path; what pyenv has installed, but not made current, is found as well.
PYTHON_PATH := $(shell $(PYTHON) -c 'import sys; print(sys.executable)' \
	2>/dev/null || ls -d "$$(pyenv root 2>/dev/null)"/versions/$(patsubst \
	python%,%,$(notdir $(PYTHON))).*/bin/python 2>/dev/null | tail -n 1)
VENV := .venv
PY := $(VENV)/bin/python
# Caches stay in the checkout, so that nothing outside it is touched.
export PIP_CACHE_DIR ?= $(CURDIR)/.cache/pip
export MPLCONFIGDIR ?= $(CURDIR)/.cache/matplotlib
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The environment is made anew when the interpreter or a requirement changes.
STAMP := $(VENV)/.made-$(shell { echo "$(PYTHON_PATH)"; \
	$(PYTHON_PATH) -c 'import sys; print(sys.version)'; \
	cat setup.py Makefile; } 2>/dev/null | cksum | tr ' ' '-')

.PHONY: help setup test demo defects bench lint docs clean

help:
	@echo 'make demo     train an SNGAN on real handwritten digits (CPU, 2 minutes)'
	@echo 'make test     run the tests, with coverage'
	@echo 'make defects  the built-in hook beside this one, fault by fault'
	@echo 'make bench    time the normalization of one weight on both'
	@echo 'make lint     ruff and mypy'
	@echo 'make docs     build the documentation, warnings are errors'
	@echo 'make setup    only make .venv/ (the others do this themselves)'
	@echo 'make clean    remove .venv/, caches and build products'
	@echo 'PYTHON=python3.13 make test   picks the interpreter (3.8 to 3.13)'

setup: $(STAMP)

# Chainer 7.8.1 exists only as an sdist whose setup.py imports pkg_resources,
# which setuptools dropped in version 82.  With --no-build-isolation it is
# built by the setuptools of this environment, whatever pip's age.  Afterwards
# setuptools is brought up to date: sn_function does without pkg_resources.
$(STAMP):
	@test -n "$(PYTHON_PATH)" || { echo "No interpreter called $(PYTHON) \
	was found. Install CPython 3.8 to 3.13, or name one: make PYTHON=..."; \
	exit 1; }
	@echo "Making $(VENV)/ with $$($(PYTHON_PATH) --version) ..."
	@rm -rf $(VENV)
	$(PYTHON_PATH) -m venv $(VENV)
	$(PY) -m pip install --quiet 'setuptools<81' wheel
	$(PY) -m pip install --quiet --no-build-isolation 'chainer==7.8.1'
	$(PY) -m pip install --quiet --no-build-isolation --editable '.[examples,test]'
	$(PY) -m pip install --quiet --upgrade setuptools
	@touch $@
	@echo "$(VENV)/ is ready: $$($(PY) -c 'import numpy; print("NumPy", numpy.__version__)'), Chainer 7.8.1"

test: setup
	$(PY) -m pytest --cov

demo: setup
	$(PY) examples/train_sngan_digits.py --out result

defects: setup
	$(PY) -m tests.defects

bench: setup
	OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 \
		$(PY) -m tests.benchmarks.one_weight

lint: setup
	$(PY) -m ruff check .
	$(PY) -m mypy

$(STAMP)-docs: $(STAMP)
	$(PY) -m pip install --quiet --no-build-isolation --editable '.[docs]'
	@touch $@

docs: $(STAMP)-docs
	$(PY) -m sphinx -W --keep-going -b html docs docs/_build/html

clean:
	rm -rf $(VENV) .cache build dist *.egg-info docs/_build result \
		.pytest_cache .mypy_cache .ruff_cache .coverage
