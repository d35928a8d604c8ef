"""What the overhead page is made of; .ci/prove.py looks at it in a browser."""

import copy
import json
import math
import re
import subprocess
import sys

import pytest
from asv.util import UserError

from tracking.project import asv_settings
from tracking.results import ATTENTION, BOUND, MISSING, NAMES, RESULTS, STEP, TOKENS, Value
from website import overhead
from website.publish import OverheadPage

ROWS = "overhead.GatherRows.ratio_vs_contiguous"
CELL, BIG = ("1", "1024", "32"), ("4", "32768", "32")


def value(x):
    return Value(x, x - 0.1, x + 0.1)


def test_paths_have_the_names_of_decode_paths():
    names = ["Batch16", "Bound", "BoundBatch16", "Auto", "GatherBlockMajor", "Fused", "Contiguous"]
    paths = ["auto"] * 4 + ["gather_block_major", "fused", "contiguous"]
    assert [overhead._path(name) for name in names] == paths


def test_missing_failed_and_known_are_told_apart():
    tables = [
        {ATTENTION: {CELL: value(2.0), BIG: MISSING}},
        {
            ATTENTION: {CELL: Value(None), BIG: MISSING},
            ROWS: {CELL: Value(math.nan, why="too slow")},
        },
    ]
    rows = overhead.ratio_rows("box", tables)
    assert [(r["commit"], r["path"], r["state"], r["value"]) for r in rows] == [
        (0, "auto", "ok", 2.0),
        (1, "auto", "failed", None),
        (1, "gather_rows", "too slow", None),
    ]  # BIG has a number nowhere
    assert rows[0]["link"] == (
        f"index.html#{ATTENTION}?machine=box&p-batch=1&p-context=1024&p-block_size=32"
    )
    json.dumps(rows, allow_nan=False)


def test_a_row_says_what_it_measures_and_the_step_comes_first():
    wide = ("16", "1024", "32")
    table = {
        ATTENTION: {CELL: value(0.5)},
        "overhead.Batch16.ratio_vs_contiguous": {wide: value(0.6)},
        BOUND: {CELL: value(1.2)},
        "step.BoundBatch16.ratio_step_vs_bound": {wide: value(1.3)},
        STEP: {CELL: value(1.0)},
        "step.Batch16.ratio_step_vs_contiguous": {wide: value(1.1)},
        "step.Waiting.ratio_step_vs_contiguous": {CELL: value(9.0)},
        "step.WaitingBatch16.ratio_step_vs_contiguous": {wide: value(9.0)},
    }
    rows = overhead.ratio_rows("box", [table])
    assert [(row["measure"], row["path"], row["batch"], row["value"]) for row in rows] == [
        ("step", "auto", 1, 1.0),
        ("step", "auto", 16, 1.1),
        ("bound", "auto", 1, 1.2),
        ("bound", "auto", 16, 1.3),
        ("attention", "auto", 1, 0.5),
        ("attention", "auto", 16, 0.6),
    ]
    assert rows[0]["link"].startswith(f"index.html#{STEP}?machine=box&")


def test_the_page_has_the_headlines_of_the_terminal_in_their_order():
    measures = overhead.RATIOS.items()
    assert all(p.fullmatch(name) for (_, p), name in zip(measures, NAMES, strict=True))
    html = overhead.TEMPLATE.read_text()
    sections = re.findall(r'<section class="measure" id="(\w+)">\n<h2>(.*)</h2>', html)
    titles = [name.capitalize() for name in NAMES.values()]
    assert sections == list(zip(overhead.RATIOS, titles, strict=True))


def test_bandwidth_is_bytes_over_time():
    tables = [{"decode.Auto.time_decode": {CELL: Value(1e-3, 0.9e-3, 1.1e-3)}}]
    [row] = overhead.bandwidth_rows("box", tables)
    gigabytes = 2 * 1024 * 8 * 128 * 2 / 1e9
    assert row["value"] == pytest.approx(gigabytes / 1e-3)
    assert row["low"] == pytest.approx(gigabytes / 1.1e-3)
    assert row["low"] < row["value"] < row["high"]


def headline(*autos, name=STEP, measure="step"):
    tables = [{name: {CELL: a, BIG: b}} for a, b in autos]
    labels = ["0 · gather (a)", "1 · in place (b)", "cccccccc"][: len(tables)]
    if name == TOKENS:
        tables = [{name: {cell[:2]: x for cell, x in t[name].items()}} for t in tables]
    return overhead.headline(overhead.ratio_rows("box", tables), measure, labels)


@pytest.mark.parametrize(("measure", "name"), list(zip(overhead.RATIOS, NAMES, strict=True)))
def test_each_measure_has_its_own_headline(measure, name):
    assert headline((value(2.0), value(4.0)), name=name, measure=measure)["cells"] == 2
    others = [other for other in NAMES if other != name]
    for other in others:
        assert headline((value(2.0), value(4.0)), name=other, measure=measure) is None


def test_the_headline():
    said = headline((value(2.0), value(4.0)), (value(1.0), value(3.0)))
    assert (said["commit"], said["cells"]) == (1, 2)
    assert said["median"] == pytest.approx({"value": 2.0, "low": 1.9, "high": 2.1})
    assert said["worst"]["value"] == 3.0
    assert said["worst"]["context"] == 32768
    change = said["change"]
    assert (change["since"], change["cells"]) == (0, 2)
    assert change["value"] == pytest.approx((0.5 + 0.75) / 2)
    assert change["low"] == pytest.approx((0.9 / 2.1 + 2.9 / 4.1) / 2)


def test_the_headline_compares_with_the_phase_before_in_common_cells():
    said = headline((value(2.0), value(4.0)), (value(1.5), MISSING), (value(3.0), value(8.0)))
    assert said["commit"] == 2
    assert (said["change"]["since"], said["change"]["cells"]) == (1, 1)
    assert said["change"]["value"] == 2.0
    assert headline((value(2.0), value(4.0)))["change"] is None
    assert headline((MISSING, Value(None))) is None


def test_the_worst_of_what_is_better_when_larger_is_the_smallest():
    said = headline((value(2.0), value(4.0)), name=TOKENS, measure="tokens")
    assert said["worst"]["value"] == 2.0
    row = said["worst"]
    assert (row["batch"], row["context"], row["block"], row["path"]) == (1, 1024, 32, "auto")
    assert row["link"] == f"index.html#{TOKENS}?machine=box&p-sequences=1&p-context=1024"


def test_what_else_a_user_of_mlx_lm_gets_is_told_in_words():
    table = {
        "generate.Forks.track_memory": {("4096", "1"): Value(1.06), ("512", "0"): value(1.0)},
        "server.Requests.ratio_requests_per_second": {("32",): value(1.7), ("1",): MISSING},
    }
    rows = overhead.fact_rows("box", table)
    assert [(row["what"], row["value"]) for row in rows] == [
        ("requests a second over mlx_lm.server, 32 clients that share a system prompt", 1.7),
        ("memory of 8 forks over that of one, 512 tokens, each grown by 0", 1.0),
        ("memory of 8 forks over that of one, 4096 tokens, each grown by 1", 1.06),
    ]


def test_what_is_told_in_words_is_measured():
    from benchmarks import generate, server

    modules = {"generate": generate, "server": server}
    for name, words in overhead.WITH_MLX_LM.items():
        module, kind, function = name.split(".")
        found = getattr(modules[module], kind)
        assert hasattr(found, function)
        assert words.count("{}") == len(found.params)


def test_regressions_are_grouped_by_cause(tmp_path, monkeypatch):
    monkeypatch.setattr(overhead, "git", lambda *args: f"subject of {args[-1]}")
    monkeypatch.setattr(overhead, "commit_label", lambda commit: commit)
    jump = [None, 2, 1.0, 1.5]
    found = [
        ["a(1)", "", {"machine": "box"}, 0, 1.5, 1.0, [jump]],
        ["b(1)", "", {}, 0, 0.5, 1.0, [[1, 3, 1.0, 0.5]]],
        ["a(2)", "", {"machine": "box"}, 1, 3.0, 1.0, [jump]],
    ]
    (tmp_path / "regressions.json").write_text(json.dumps({"regressions": found}))
    listed = {"a": {"better": "smaller"}, "b": {"better": "larger"}}
    groups = overhead.causes(tmp_path, {"one": 1, "two": 2, "three": 3}, listed)
    assert [(g["after"], g["commit"], len(g["cells"])) for g in groups] == [
        (None, "two", 2),
        ("one", "three", 1),
    ]
    assert groups[0]["subject"] == "subject of two"
    assert groups[1]["cells"][0]["factor"] == 2.0
    assert groups[0]["cells"][0] == {"name": "a(2)", "machine": "box", "factor": 3.0}


@pytest.fixture(scope="module")
def recorded():
    return overhead.gather(RESULTS)


def test_the_page_is_one_file_that_asks_for_nothing(recorded):
    data = copy.deepcopy(recorded)
    data["series"][0]["commits"][0]["subject"] = "</script><script>alert(1)</script>"
    html = overhead.page(data)
    assert "alert(1)</script>" not in html
    assert not re.search(r"<(?:script|link)[^>]+(?:src|href)=\"(?!data:)", html)
    embedded = re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1]
    assert json.loads(embedded)["series"][0]["commits"][0]["subject"].startswith("</script>")


def test_recorded_machines_are_on_the_page(recorded):
    machines = {one["machine"]: one for one in recorded["series"]}
    assert {"h200", "linux-2core-xeon"} <= machines.keys()
    labels = [commit["label"] for commit in machines["h200"]["commits"]]
    assert [label[0] for label in labels[:7]] == list("0123456")
    assert machines["h200"]["copy"] > 1000
    cells = machines["linux-2core-xeon"]["tables"][0]
    assert all(len(row) == len(recorded["columns"]) for row in cells)


def test_two_versions_of_mlx_are_two_series(versions):
    results, _, _, environments = versions
    old, new = overhead.gather(results)["series"]
    assert [old["environment"], new["environment"]] == environments
    medians = [one["headlines"]["attention"]["median"]["value"] for one in (old, new)]
    assert medians[1] == pytest.approx(10 * medians[0])


def test_the_page_says_which_numpy_and_keeps_the_series(versions):
    """Results recorded without it are in the same series as those with it."""
    folder, machine, commit, (pinned, _) = versions
    [file] = (folder / machine).glob(f"*-{pinned}.json")
    content = json.loads(file.read_text())
    others = overhead.git("log", "-2", "--format=%H").split()
    for other, version in zip(others, (20406.0, 20299.0), strict=True):
        content["commit_hash"] = other
        content["results"]["host.NumPy.track_version"] = [[version], [], "1", 1, 0.1]
        (folder / machine / f"{other[:8]}-{pinned}.json").write_text(json.dumps(content))
    one = overhead.series_of(machine, pinned, folder)
    assert {commit, *others} == {c["hash"] for c in one["commits"]}
    assert one["about"].endswith("NumPy 2.4.6 and 2.2.99 and not recorded")
    assert "NumPy not recorded" in overhead.series_of(machine, pinned, folder, [commit])["about"]


def test_plugins_need_asv_alone():
    """On a machine without network there is asv, MLX and a commit's pagedkv, and nothing else."""
    blocked = ("altair", "vl_convert", "jsonschema", "pagedkv", "mlx", "numpy")
    code = f"import sys; sys.modules |= dict.fromkeys({blocked})\n" + "\n".join(
        f"import {plugin[1:]}" for plugin in asv_settings()["plugins"]
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=overhead.ROOT)


@pytest.mark.parametrize("name", overhead.FIGURES)
def test_figures_show_what_results_say(name):
    rows = overhead.figure_rows(name)
    assert any(row["state"] == "ok" for row in rows)
    svg = (overhead.ROOT / f"docs/images/{name}.svg").read_text()
    assert f"rows {overhead.digest(rows)}" in svg, "the figure is stale: `make adr`"


def test_an_index_without_the_navigation_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "index.html").write_text("<html></html>")
    (tmp_path / "regressions.json").write_text('{"regressions": []}')
    monkeypatch.setattr(overhead, "gather", lambda *args: {"series": [], "regressions": []})
    conf = type("Conf", (), {"html_dir": str(tmp_path), "results_dir": ""})
    with pytest.raises(UserError, match="nav-li-regressions"):
        OverheadPage.publish(conf, None, {}, None, {})


@pytest.mark.parametrize("params", [[["a"], ["1024"], ["32"]], [["1"]], []])
def test_cells_of_another_kind_leave_a_series_out_and_the_rest_stays(params, versions, capsys):
    folder, machine, commit, (pinned, newest) = versions
    file = folder / machine / f"{commit[:8]}-{newest}.json"
    data = json.loads(file.read_text())
    data["results"][ATTENTION] = [[1.0], params, "1", 1]
    file.write_text(json.dumps(data))
    assert [one["environment"] for one in overhead.gather(folder)["series"]] == [pinned]
    assert f"{machine} in {newest} is left out: " in capsys.readouterr().err
