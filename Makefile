# Each target does all of its own set-up: .venv is made from the requirements when missing or stale.
PYTHON ?= $(firstword $(foreach p,python3.12 python3.11 python3.13 python3,$(shell \
	command -v $(p) >/dev/null 2>&1 && $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))
BIN := .venv/bin

.PHONY: demo test test-slow lint format clean

demo: .venv/ready
	$(BIN)/python train.py --config=configs/digits_vgg7.py --workdir=runs/demo

test: .venv/ready-dev
	$(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

test-slow: .venv/ready-dev
	$(BIN)/python -m pytest -q -m slow --timeout=1800

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: .venv/ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .cache build *.egg-info

.venv/ready: requirements.txt pyproject.toml
	$(if $(PYTHON),,$(error no Python of 3.11 or later found: install one, or name it with make PYTHON=/path/to/python3.12))
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@
