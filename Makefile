# Two commands on a fresh machine: `make demo` and `make test`. Both set up .venv first.
# Another Python goes into a folder of its own: make test PYTHON=python3.13 VENV=.venv-3.13

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile

# Where versions of Python, NumPy and JAX differ: some files of each room, in about two minutes on two cores.
QUICK := imports config tokenizer occupations readers pickles frames selection store packing matching judging model \
	checkpoint optimizer sampling

.PHONY: demo test test-quick lint docs dist clean train-default ship-default

# The demo needs what runs; the tests need their tools besides.
$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --requirement requirements.txt --editable .
	touch $@

$(VENV)/.installed-tests: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[tests]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

$(VENV)/.installed-dist: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[dist]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python tools/demo.py demo_out

# The model in the package: trained in what the machine leaves unused, and put into the package.
train-default: $(VENV)/.installed
	$(BIN)/python tools/train_default.py

ship-default: $(VENV)/.installed
	$(BIN)/python tools/ship_default.py

lint: $(VENV)/.installed-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(PYTEST)

test-quick: lint
	$(PYTEST) $(QUICK:%=tests/test_%.py)

# The pages of docs/, into site/; a link that leads nowhere is an error.
docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --strict

# The wheel is built from the source distribution, so that what is missing there shows.
dist: $(VENV)/.installed-dist
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

clean:
	rm -rf $(VENV) demo_out build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache
