"""What the overhead page is made of; test_page.py looks at it in a browser."""

import copy
import json
import re
import subprocess
import sys
import zlib
from base64 import b64decode
from pathlib import Path

import asv
import pytest
from asv.util import UserError

from tracking.project import asv_settings
from tracking.results import ATTENTION, NAMES, RESULTS
from website import charts, overhead, series
from website.publish import CHANGES, OverheadPage


def test_the_page_has_the_headlines_of_the_terminal_in_their_order():
    html = overhead.TEMPLATE.read_text()
    sections = re.findall(r'<section class="measure" id="(\w+)">\n<h2>(.*)</h2>', html)
    titles = [name.capitalize() for name in NAMES.values()]
    assert sections == list(zip(series.RATIOS, titles, strict=True))


def test_regressions_are_grouped_by_cause(tmp_path, monkeypatch):
    monkeypatch.setattr(overhead, "subjects", lambda all: {c: f"subject of {c}" for c in all})
    monkeypatch.setattr(overhead, "commit_labels", lambda all: {c: f"label of {c}" for c in all})
    jump = [None, 2, 1.0, 1.5]
    found = [
        ["a(1)", "", {"machine": "box"}, 0, 1.5, 1.0, [jump]],
        ["b(1)", "", {}, 0, 0.5, 1.0, [[1, 3, 1.0, 0.5]]],
        ["a(2)", "", {"machine": "box"}, 1, 3.0, 1.0, [jump]],
    ]
    reason = {"commit": "two", "reason": "worth it", "link": "https://x"}
    accepted = {**reason, "regression": ["c(1)", "", {"machine": "box"}, 0, 2.0, 1.0, [jump]]}
    written = {"regressions": found, "accepted": [accepted]}
    (tmp_path / "regressions.json").write_text(json.dumps(written))
    about = {"param_names": ["size"]}
    listed = {"a": about, "b": {"better": "larger", **about}, "c": about}
    groups = overhead.causes(tmp_path, {"one": 1, "two": 2, "three": 3}, listed)
    assert [(g["from"], g["to"], len(g["cells"])) for g in groups] == [
        (None, "two", 2),
        ("one", "three", 1),
        (None, "two", 1),
    ]
    assert [g["accepted"] for g in groups] == [
        None,
        None,
        {"reason": "worth it", "link": "https://x"},
    ]
    assert [(g["after"], g["commit"]) for g in groups] == [
        (None, "label of two"),
        ("label of one", "label of three"),
        (None, "label of two"),
    ]
    assert groups[0]["subject"] == "subject of two"
    assert groups[1]["cells"][0]["factor"] == 2.0
    worst = {"name": "a(2)", "machine": "box", "factor": 3.0}
    assert groups[0]["cells"][0] == {**worst, "benchmark": "a", "params": {"size": "2"}}


@pytest.mark.parametrize(
    ("origin", "page"),
    [
        ("git@github.com:owner/pagedkv.git", "https://github.com/owner/pagedkv"),
        ("https://github.com/owner/pagedkv", "https://github.com/owner/pagedkv"),
        ("/srv/git/pagedkv.git", None),
    ],
)
def test_diffs_are_linked_where_the_repository_is_on_github(origin, page, monkeypatch):
    monkeypatch.setattr(overhead, "git", lambda *args: origin)
    assert overhead.repository_page() == page


def test_a_repository_without_an_origin_has_no_page(monkeypatch):
    def fail(*args):
        raise UserError("git remote: no such remote")

    monkeypatch.setattr(overhead, "git", fail)
    assert overhead.repository_page() is None


@pytest.fixture(scope="module")
def recorded():
    return overhead.gather(RESULTS)


def test_the_page_is_one_file_that_asks_for_nothing(recorded):
    data = copy.deepcopy(recorded)
    harm = "</script><script>alert(1)</script>"
    data["series"][0]["commits"][0]["subject"] = harm
    data["regressions"] = [{"subject": harm}]
    html = overhead.page(data)
    assert "alert(1)</script>" not in html
    assert not re.search(r"<(?:script|link)[^>]+(?:src|href)=\"(?!data:)", html)
    embedded = json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1])
    assert embedded["regressions"] == data["regressions"]
    for packed, one in zip(embedded["series"], data["series"], strict=True):
        assert json.loads(zlib.decompress(b64decode(packed["packed"]))) == one


def test_a_path_has_one_colour_and_no_two_paths_share_it(recorded):
    paths = {one["path"] for each in recorded["series"] for one in each["benchmarks"]} - {""}
    assert {"auto", "contiguous"} <= paths <= charts.PATHS.keys()
    assert len(set(charts.PATHS.values())) == len(charts.PATHS)
    assert charts.colours([], [0])["0"] == charts.colours([], [256])["256"]
    few = charts.colours(["mine", "auto"], [1024])
    many = charts.colours(["auto", "fused", "gather_rows"], [512, 1024, 32768])
    assert few["auto"] == many["auto"]
    assert few["1024"] == many["1024"]
    assert few["mine"] not in many.values()


def test_a_chart_has_the_colours_of_its_rows_and_letters_that_can_be_read():
    spec = charts.CHARTS["contexts"].to_dict()
    rows = [{"path": "fused"}, {"path": "auto"}]
    charts.paint(spec, rows, charts.PATHS)
    scales = [x["encoding"]["color"]["scale"] for x in spec["layer"] if "color" in x["encoding"]]
    expected = {"domain": ["auto", "fused"], "range": [charts.PATHS[p] for p in ("auto", "fused")]}
    assert scales == [expected] * 2
    for part in ("axis", "legend"):
        assert min(spec["config"][part].values()) >= 12


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
    assert rows
    svg = (overhead.ROOT / f"docs/images/{name}.svg").read_text()
    assert f"rows {overhead.digest(rows)}" in svg, "the figure is stale: `make adr`"


def test_an_index_without_the_navigation_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "index.html").write_text("<html></html>")
    (tmp_path / "regressions.json").write_text('{"regressions": []}')
    monkeypatch.setattr(overhead, "gather", lambda *args: {"series": [], "regressions": []})
    conf = type("Conf", (), {"html_dir": str(tmp_path), "results_dir": ""})
    with pytest.raises(UserError, match="nav-li-regressions"):
        OverheadPage.publish(conf, None, {}, None, {})


@pytest.mark.parametrize("name", CHANGES)
def test_asvs_pages_have_once_what_is_changed_in_them(name):
    text = (Path(asv.__file__).parent / "www" / name).read_text()
    assert text.count(CHANGES[name][0]) == 1


@pytest.mark.parametrize("params", [[["a"], ["1024"], ["32"]], [["1"]], []])
def test_cells_of_another_kind_leave_a_series_out_and_the_rest_stays(params, versions, capsys):
    folder, machine, commit, (pinned, newest) = versions
    file = folder / machine / f"{commit[:8]}-{newest}.json"
    data = json.loads(file.read_text())
    data["results"][ATTENTION] = [[1.0], params, "1", 1]
    file.write_text(json.dumps(data))
    assert [one["environment"] for one in overhead.gather(folder)["series"]] == [pinned]
    assert f"{machine} in {newest} is left out: " in capsys.readouterr().err
