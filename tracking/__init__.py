"""Runs, reads and judges measurements: history, comparisons, nightly runs, tables of results."""

import importlib.util
import sys

if importlib.util.find_spec("asv") is None:
    sys.exit(
        f"asv is not installed for {sys.executable}: run this with .venv/bin/python, "
        "which `make test` and `make bench` set up"
    )
