# `make bench` and `make test` do all of their own set-up. `make help` lists the rest.
PYTHON ?= python3
# MLX backend: cpu (Linux CPU; on macOS this is Metal), cuda12 or cuda13.
BACKEND ?= cpu

VENV := .venv$(if $(filter-out cpu,$(BACKEND)),-$(BACKEND))
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help test lint types unit format clean

help:
	@echo "make test    lint, types and tests"
	@echo "make format  let ruff rewrite the sources"
	@echo "make clean   remove environments, caches and built pages (results stay)"

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade "pip>=25.1"
	$(BIN)/python -m pip install -q --editable ".[$(BACKEND)]" --group dev
	touch $@

test: lint types unit

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

unit: $(READY)
	$(BIN)/pytest

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv* .asv .hypothesis .mypy_cache .pytest_cache .ruff_cache website/node_modules asv.*.conf.json
