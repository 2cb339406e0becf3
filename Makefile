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

# The environment is made anew when the interpreter, a requirement in setup.py
# or this number changes.  Raise it when the recipe below makes another one.
ENVIRONMENT := 2
STAMP := $(VENV)/.made-$(shell { echo $(ENVIRONMENT) "$(PYTHON_PATH)"; \
	$(PYTHON_PATH) -c 'import sys; print(sys.version)'; \
	sed -n '/install_requires/,/^    },/p' setup.py; } 2>/dev/null \
	| cksum | tr ' ' '-')

.PHONY: help setup check test test-all test-slow test-mpi test-nvrtc ci \
	matrix extremes upstream demo demo-invertible demo-short defects silent bench truth threads nvrtc \
	sass mutants gpu gpu-bundle lint docs linkcheck clean
# All targets share the environment, and the cores.
.NOTPARALLEL:

help:
	@echo 'make demo     train an SNGAN on real handwritten digits (CPU, 1 to 4 minutes)'
	@echo 'make demo-invertible  train a network that runs backwards (CPU, 1 to 4 minutes)'
	@echo 'make check    lint, and the core of the tests (1 minute)'
	@echo 'make test     the tests but the slow ones, with coverage (3 minutes)'
	@echo 'make test-all all tests, with coverage (6 minutes)'
	@echo 'make test-mpi ChainerMN on 2 to 4 ranks, CPU (2 minutes)'
	@echo 'make ci       what is run for each change (20 minutes)'
	@echo 'make matrix   the tests with all supported versions (an hour, 2 cores)'
	@echo 'make upstream CHAINER=DIR  the tests of a checkout of Chainer (CPU, half an hour)'
	@echo 'make defects  the built-in hook beside this one, fault by fault'
	@echo 'make silent   faults that showed in no error, before and now'
	@echo 'make bench    time weights and models beside others (CPU, 25 minutes)'
	@echo 'make truth    errors of sigma and Y on hard matrices'
	@echo 'make threads  four threads that call one model (CPU, 20 minutes)'
	@echo 'make nvrtc    compile every CUDA kernel, without a device'
	@echo 'make sass     what the loops of the kernels do, and estimated times'
	@echo 'make mutants  can the tests of the kernels fail?'
	@echo 'make gpu      tests and benchmark on a CUDA device (10 minutes)'
	@echo 'make gpu-bundle  what make gpu may lack there, into gpu-bundle/'
	@echo 'make dist     sdist and wheel into dist/, checked (2 minutes)'
	@echo 'make lint     ruff and mypy'
	@echo 'make docs     build the documentation, warnings are errors'
	@echo 'make linkcheck  follow the links of the documentation; needs a network'
	@echo 'make setup    only make .venv/ (the others do this themselves)'
	@echo 'make clean    remove .venv/, caches and build products'
	@echo 'PYTHON=python3.13 make test   picks the interpreter (3.8 to 3.13)'

setup: $(STAMP)

# To build Chainer 7.8.1 takes an old setuptools.  pip 25.3 and newer read the
# first variable, older ones the second, and those before 23.1 need the third;
# pip passes by those that it does not know.  The second also limits what is
# installed, so setuptools is brought up to date afterwards: sn_function does
# without pkg_resources.
CONSTRAINED := PIP_BUILD_CONSTRAINT=build-constraints.txt \
	PIP_CONSTRAINT=build-constraints.txt PIP_USE_PEP517=1

$(STAMP):
	@test -n "$(PYTHON_PATH)" || { echo "No interpreter called $(PYTHON) \
	was found. Install CPython 3.8 to 3.13, or name one: make PYTHON=..."; \
	exit 1; }
	@echo "Making $(VENV)/ with $$($(PYTHON_PATH) --version) ..."
	@rm -rf $(VENV)
	$(PYTHON_PATH) -m venv $(VENV)
	$(CONSTRAINED) $(PY) -m pip install --quiet \
		--editable '.[examples,lint,onnx,test]'
	$(PY) -m pip install --quiet --upgrade setuptools
	@touch $@
	@echo "$(VENV)/ is ready: $$($(PY) -c 'import numpy; print("NumPy", numpy.__version__)'), Chainer 7.8.1"

# More threads of BLAS than needed wait for each other where others work, too.
PYTEST := OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(PY) -m pytest

# From the arithmetic to what is done to a model, on the host, in this process.
CORE := $(addprefix tests/, arithmetic graph links test_functions.py \
	test_link_hooks.py test_chain.py test_optimizer_hooks.py test_bake.py \
	test_snapshot.py test_parity.py test_errors.py test_docs.py)

check: lint
	$(PYTEST) -q -n auto -m 'not slow and not gpu' $(CORE)

test: setup
	$(PYTEST) --cov -n auto -m 'not slow'

test-all: setup
	$(PYTEST) --cov -n auto

test-slow: setup
	$(PYTEST) -n auto -m slow

# What continuous integration runs.  Nothing runs twice: the tests of NVRTC and
# of MPI need extras, and are skipped until these are installed.
ci: lint test test-slow docs demo-short test-nvrtc test-mpi extremes

# MATRIX='--python 3.8' is the cells of one interpreter.
matrix: setup
	OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(PY) -m tests.tools.versions $(MATRIX)

# The oldest cell and the newest.
extremes: MATRIX := --extremes
extremes: matrix

# CHAINER is a checkout of Chainer 7.8.1.  UPSTREAM='--stack 3.8/1.17.3' is with
# another CPython and NumPy; UPSTREAM='--only links_tests' is a part of it.
upstream: setup
	@test -n "$(CHAINER)" || { echo "Name a checkout of Chainer 7.8.1: \
	make upstream CHAINER=DIR"; exit 1; }
	$(PY) -m tests.tools.upstream $(CHAINER) $(UPSTREAM)

demo: setup
	$(PY) examples/train_sngan_digits.py --out result

demo-invertible: setup
	$(PY) examples/train_iresnet_digits.py --out result-iresnet

demo-short: setup
	$(PY) examples/train_sngan_digits.py --iteration 60 --out result-short
	$(PY) examples/train_iresnet_digits.py --iteration 20 --out result-short

defects: setup
	$(PY) -m tests.tools.defects

# SILENT='--before CHECKOUT' is beside an earlier version, not Chainer's hook.
silent: setup
	OPENBLAS_NUM_THREADS=1 $(PY) -m tests.tools.silent $(SILENT)

# With the threads that BLAS takes by default, then with one.  BENCH=--quick is
# a short one; BENCH='--out DIRECTORY' keeps the results.
bench: setup
	$(PY) -m tests.tools.benchmarks.cpu $(BENCH)

$(STAMP)-nvrtc: $(STAMP)
	$(PY) -m pip install --quiet --no-build-isolation --editable '.[nvrtc]'
	@touch $@

$(STAMP)-mpi: $(STAMP)
	$(PY) -m pip install --quiet --no-build-isolation --editable '.[mpi]'
	@touch $@

test-mpi: $(STAMP)-mpi
	$(PY) -m pytest tests/mpi/runs.py tests/graph/test_sharded.py

truth: setup
	OPENBLAS_NUM_THREADS=1 $(PY) -m tests.tools.truth

threads: setup
	OPENBLAS_NUM_THREADS=1 $(PY) -m tests.tools.threads

nvrtc: $(STAMP)-nvrtc
	$(PY) -m tests.tools.nvrtc

# SASS=--rst prints tables for the documentation.
sass: $(STAMP)-nvrtc
	$(PY) -m tests.tools.sass $(SASS)

test-nvrtc: $(STAMP)-nvrtc
	$(PYTEST) tests/test_tools/test_nvrtc.py tests/test_tools/test_sass.py

# A quarter of an hour on two cores.
mutants: setup
	$(PY) -m tests.tools.mutants

# On a machine with a CUDA device there may be no network, and no .venv/: an
# interpreter that has NumPy and CuPy is enough.  What it lacks is taken from
# gpu-bundle/, made by `make gpu-bundle` and copied there.  GPU='--seconds 300'
# is a shorter run; `python3 -m tests.tools.gpu --help` lists the options.
GPU_PYTHON ?= python3
GPU_OUT ?= result-gpu

gpu:
	$(GPU_PYTHON) -m tests.tools.gpu --out $(GPU_OUT) $(GPU)

# Chainer is built as in `setup`; the rest is what it and pytest require.
gpu-bundle:
	@test -n "$(PYTHON_PATH)" || { echo "No interpreter called $(PYTHON)"; \
	exit 1; }
	rm -rf gpu-bundle
	$(PYTHON_PATH) -m venv gpu-bundle/venv
	$(CONSTRAINED) gpu-bundle/venv/bin/python -m pip wheel --quiet \
		--no-deps --wheel-dir gpu-bundle 'chainer==7.8.1'
	gpu-bundle/venv/bin/python -m pip download --quiet --no-deps \
		--only-binary :all: --python-version 3.12 --implementation cp \
		--platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 \
		--platform manylinux_2_27_x86_64 --platform manylinux_2_28_x86_64 \
		--dest gpu-bundle filelock protobuf six \
		typing_extensions pytest iniconfig packaging pluggy pygments \
		pytest-xdist execnet
	rm -rf gpu-bundle/venv
	@du -sh gpu-bundle

$(STAMP)-dist: $(STAMP)
	$(PY) -m pip install --quiet build twine
	@touch $@

# The wheel is made of the sdist, and has to be imported where nothing else is.
.PHONY: dist
dist: $(STAMP)-dist
	rm -rf dist .cache/dist
	$(PY) -m build
	$(PY) -m twine check --strict dist/*
	$(PYTHON_PATH) -m venv .cache/dist
	$(CONSTRAINED) .cache/dist/bin/python -m pip install --quiet dist/*.whl
	cd .cache && dist/bin/python -m sn_function doctor

lint: setup
	$(PY) -m ruff check .
	$(PY) -m mypy

$(STAMP)-docs: $(STAMP)
	$(PY) -m pip install --quiet --no-build-isolation --editable '.[docs]'
	@touch $@

# From nothing, so that no page of before hides a link that leads nowhere.
DOCS := docs/_build docs/reference/generated

docs: $(STAMP)-docs
	rm -rf $(DOCS)
	OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(PY) -m sphinx -W --keep-going -b html \
		-d docs/_build/doctrees docs docs/_build/html
	$(PY) -m tests.tools.links docs/_build/html >docs/_build/outside.txt

# Needs a network: whether what docs/_build/outside.txt lists is there.
linkcheck: $(STAMP)-docs
	$(PY) -m sphinx -b linkcheck docs docs/_build/linkcheck

clean:
	rm -rf $(VENV) .cache build dist *.egg-info $(DOCS) result \
		.pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov
