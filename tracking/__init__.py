"""Runs, reads and judges measurements: history, comparisons, nightly runs, tables of results."""
