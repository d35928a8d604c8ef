"""Data flows one way, and nothing outside the package reaches into private names of it."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOST_ONLY = {"errors", "block_pool", "block_table", "prefix_cache", "scheduler", "stats"}
# What each module of the package may import of the package.
MAY_IMPORT = {
    "errors": set(),
    "block_pool": {"errors"},
    "block_table": {"block_pool", "errors"},
    "prefix_cache": {"block_pool"},
    "scheduler": {"block_pool", "block_table", "errors", "prefix_cache", "stats"},
    "stats": set(),
    "step": {"block_table"},
    "kv_cache": {"block_pool", "block_table", "step"},
    "gather": {"step"},
    "scores": set(),
    "fused": {"block_table", "kernels", "scores", "step"},
    "paths": {"fused", "gather", "kv_cache", "scores", "step"},
    "tune": {"attention", "fused", "paths", "scores", "step"},
    "attention": {"errors", "gather", "kv_cache", "paths", "scores", "step"},
}


def imports(path):
    """Every imported dotted name, relative imports as `.name`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def modules(folder):
    return {path.stem: path for path in sorted((ROOT / folder).glob("*.py"))}


@pytest.mark.parametrize("name", sorted(set(modules("pagedkv")) - {"__init__"}))
def test_package_modules_import_downwards(name):
    found = imports(modules("pagedkv")[name])
    own = {item.split(".")[1] for item in found if item.startswith("pagedkv.")}
    assert own <= MAY_IMPORT[name]
    outside = {item.split(".")[0] for item in found} - {"pagedkv"}
    assert outside <= {"mlx", "numpy"} | sys.stdlib_module_names
    if name in HOST_ONLY:
        assert "mlx" not in outside


@pytest.mark.parametrize("folder", ["benchmarks", "website"])
def test_only_public_names_of_the_package_are_used(folder):
    for path in modules(folder).values():
        for item in imports(path):
            if item.split(".")[0] == "pagedkv":
                assert not any(part.startswith("_") for part in item.split(".")), path
        names = {
            node.attr
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "pagedkv"
        }
        assert not any(name.startswith("_") for name in names), path


def test_benchmarks_import_nothing_that_an_old_commit_may_lack():
    allowed = {"mlx", "numpy", "pagedkv", "asv_runner", ""} | sys.stdlib_module_names
    for path in modules("benchmarks").values():
        found = imports(path)
        assert {item.split(".")[0] for item in found} <= allowed, path
        assert not any(item.startswith("pagedkv.") for item in found), path
