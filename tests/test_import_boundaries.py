"""Data flows one way, and nothing outside the package reaches into private names of it."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What each room of the package may import of the others. A room is a folder or a file.
ROOMS = {
    "errors": set(),
    "limits": set(),
    "kernels": set(),
    "host": {"errors", "limits"},
    "attention": {"errors", "limits", "kernels"},
    "cache": {"errors", "limits", "host", "kernels", "attention"},
    "mlx_lm": {"errors", "limits", "host", "attention", "cache"},
}
OF_THE_SERVER = {
    "pagedkv.mlx_lm.http": {"huggingface_hub"},
    "pagedkv.mlx_lm.metrics": {"prometheus_client"},
    "pagedkv.mlx_lm.requests": {"pydantic", "pydantic_core"},
}
HOST_ONLY = {"errors", "limits", "host"}


def imports(path, *, at_the_top=False):
    """Every imported dotted name, relative imports as `.name`; or those of no function's."""
    found = set()
    tree = ast.parse(path.read_text())
    for node in tree.body if at_the_top else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def modules(folder):
    return {path.stem: path for path in sorted((ROOT / folder).glob("*.py"))}


def package():
    """{dotted name: path} of the package's modules."""
    paths = sorted((ROOT / "pagedkv").rglob("*.py"))
    names = (path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in paths)
    return {name.removesuffix(".__init__"): path for name, path in zip(names, paths, strict=True)}


@pytest.mark.parametrize("name", sorted(set(package()) - {"pagedkv"}))
def test_package_modules_import_downwards(name):
    found = imports(package()[name])
    room = name.split(".")[1]
    rooms = {item.split(".")[1] for item in found if item.startswith("pagedkv.")}
    assert rooms <= ROOMS[room] | {room}
    outside = {item.split(".")[0] for item in found} - {"pagedkv"}
    own = {"mlx_lm"} if room == "mlx_lm" else set()
    own |= OF_THE_SERVER.get(name, set())
    assert outside <= {"mlx", "numpy"} | own | sys.stdlib_module_names
    if room in HOST_ONLY:
        assert "mlx" not in outside


def test_package_modules_do_not_import_in_a_circle():
    names = package()
    arrows = {name: imports(path) & set(names) - {name, "pagedkv"} for name, path in names.items()}
    list(graphlib.TopologicalSorter(arrows).static_order())  # CycleError


@pytest.mark.parametrize("folder", ["benchmarks", "tracking", "tools", "website", ".ci"])
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
        found = imports(path, at_the_top=True)
        assert {item.split(".")[0] for item in found} <= allowed, path
        assert not any(item.startswith("pagedkv.") for item in found), path


def test_website_and_tools_build_on_tracking_and_not_the_reverse():
    for path in modules("tracking").values():
        assert not {"website", "tools"} & {item.split(".")[0] for item in imports(path)}, path
