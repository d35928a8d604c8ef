"""docs/api.md has every public name, and what it says one can call is there, with these names."""

import inspect
import re
from pathlib import Path

import pytest

pytest.importorskip("mlx_lm", reason="the extra mlx-lm is not installed")
import pagedkv
import pagedkv.mlx_lm
from pagedkv.attention.calls import Explanation
from pagedkv.attention.paths import DecodePath
from pagedkv.cache.kv_cache import MemoryUsage
from pagedkv.cache.step import Extension, ScheduledStep
from pagedkv.host.cache_event import CacheEvent
from pagedkv.host.schedule import Schedule

TEXT = (Path(__file__).parents[1] / "docs/api.md").read_text()
RETURNED = [CacheEvent, DecodePath, Explanation, Extension, MemoryUsage, Schedule, ScheduledStep]
NAMES = {**vars(pagedkv), **vars(pagedkv.mlx_lm), **{each.__name__: each for each in RETURNED}}
SECTIONS = re.findall(r"^### `(\w+)([^`\n]*)`\n(.*?)(?=^##|\Z)", TEXT, re.M | re.S)


def test_it_has_every_public_name():
    public = {*pagedkv.__all__, *pagedkv.mlx_lm.__all__} - {"__version__"}
    assert public <= {*re.findall(r"`(\w+)", TEXT)}


@pytest.mark.parametrize(("name", "call", "text"), SECTIONS, ids=[name for name, *_ in SECTIONS])
def test_what_it_names_is_there(name, call, text):
    thing = NAMES[name]
    if call:
        assert call == f"({', '.join(inspect.signature(thing).parameters)})"
    for line in re.findall(r"^- (`.*?):", text, re.M):
        for member, arguments in re.findall(r"`(\w+)(\(.*?\))?`", line):
            if arguments:
                parameters = [*inspect.signature(getattr(thing, member)).parameters]
                assert arguments == f"({', '.join(x for x in parameters if x != 'self')})"
            else:
                assert not callable(getattr(thing, member, None)), member
                documented = inspect.getdoc(thing) + "".join(
                    inspect.getdoc(base) or "" for base in thing.__bases__
                )
                assert hasattr(thing, member) or re.search(rf"\b{member}\b", documented), member
