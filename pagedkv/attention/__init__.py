"""Attention over block tables, by several paths."""
