# make demo: find a circuit in the embedded model.   make test: run every test.
# Both make their own environment in .venv, from nothing but Python and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PACKAGING := settings.ini setup.py constraints.txt
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt
# a hung notebook must not hang the tests; macOS has no `timeout`
LIMIT := $(if $(shell command -v timeout),timeout 2400)

# the models are small: more threads than processes only get in each other's way
export OMP_NUM_THREADS ?= 1
export MPLBACKEND := agg
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo test docs browser notebooks gpt2 install clean

help:
	@echo 'make demo       find the Greater-Than circuit of the embedded model; writes it, its figures and a summary into demo/'
	@echo 'make test       run the tests in the notebooks and in tests/'
	@echo 'make docs       build the documentation site into _docs/'
	@echo 'make browser    drive the explorer in JupyterLab and visit every page of _docs/, in an installed Chromium'
	@echo 'make notebooks  run every notebook and save its outputs'
	@echo 'make gpt2       run the three tasks in GPT-2 small, whose weights come from the Hugging Face hub'
	@echo 'make clean      remove the environment and everything built'

demo: $(VENV)/.library
	$(BIN)/mgprune discover greater-than --kl 0.02 --out demo --force

test: $(VENV)/.tools
	$(LIMIT) $(BIN)/nbdev_test --n_workers 2 --timing
	$(LIMIT) $(BIN)/python -m pytest -q -n 2 tests

docs: $(VENV)/.tools
	$(BIN)/python -W ignore .ci/docs.py

browser: docs
	$(INSTALL) -e '.[browser]'
	$(BIN)/python tests/browser/widget.py
	$(BIN)/python tests/browser/site.py

notebooks: $(VENV)/.tools
	$(BIN)/python .ci/execute.py

gpt2: $(VENV)/.tools
	HF_HUB_OFFLINE=0 $(BIN)/python .ci/execute.py nbs/benchmarks/gpt2.ipynb

install: $(VENV)/.tools

clean:
	rm -rf $(VENV) _docs _proc _browser build dist *.egg-info demo .pytest_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'mgprune needs Python 3.11 or later: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11'; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.library: $(PACKAGING) | $(BIN)/python
	@echo 'Installing mgprune into $(VENV): PyTorch is large, this takes a few minutes.'
	$(INSTALL) -e .
	@touch $@

$(VENV)/.tools: $(PACKAGING) | $(BIN)/python
	@echo 'Installing mgprune and the development tools into $(VENV): this takes a few minutes.'
	$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/.library
