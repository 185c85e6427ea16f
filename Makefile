# Everything from a fresh clone: each target sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
REFERENCE := packages/foveate-reference
INSTALL := python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
LMMS := .venv-lmms
PEERS := .venv-peers

.PHONY: demo test test-all test-lmms test-peers lint types setup clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt $(REFERENCE)/pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/$(INSTALL) --editable '.[dev]' --editable $(REFERENCE)
	touch $@

demo: setup
	$(BIN)/foveate bench --model reference --methods random,uniform,fastv,hiprune,scope,"snapkv(window=8)",shortv \
		--keep 0.33,0.22,0.11 --n 100 --out runs/demo --resume
	@echo "The picture is runs/demo/quality_speed.png"

# One worker for each core, of one thread each: tiny models are no faster with more.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

test: setup
	$(TESTS)

test-all: setup
	$(TESTS) -m "slow or not slow"

# lmms-eval brings so much that it has an environment of its own. A torchvision that was built for another torch (PyPI's beside
# a CPU build) breaks every import; pictures do without it.
$(LMMS)/.ready: pyproject.toml constraints.txt $(REFERENCE)/pyproject.toml
	test -x $(LMMS)/bin/python || $(PYTHON) -m venv $(LMMS)
	$(LMMS)/bin/$(INSTALL) --editable '.[dev,lmms]' --editable $(REFERENCE)
	$(LMMS)/bin/python -c 'import torchvision' 2>/dev/null || $(LMMS)/bin/python -m pip uninstall --quiet --yes torchvision
	touch $@

test-lmms: $(LMMS)/.ready
	$(LMMS)/bin/python -m pytest tests/lmms

# transformers' own tests of its models, with recipes around every call; one family: make test-peers FAMILY=llava.
$(PEERS)/.ready: pyproject.toml constraints.txt $(REFERENCE)/pyproject.toml
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/$(INSTALL) --editable '.[dev,peers]' --editable $(REFERENCE)
	touch $@

test-peers: $(PEERS)/.ready
	$(PEERS)/bin/python -m tests.peers.archive
	$(PEERS)/bin/python -m pytest tests/peers $(if $(FAMILY),--family $(FAMILY))

lint: setup
	$(BIN)/ruff check src packages tests benchmarks
	$(BIN)/ruff format --check src packages tests benchmarks

types: setup
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(LMMS) $(PEERS) .peers runs .pytest_cache .mypy_cache .ruff_cache
