"""What the overhead page is made of; test_page.py looks at it in a browser."""

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

from tracking import results
from tracking.project import asv_settings
from tracking.results import ATTENTION, RESULTS, default_machine, machines
from website import overhead
from website.publish import CHANGES, OverheadPage


@pytest.mark.parametrize(
    ("origin", "page"),
    [
        ("git@github.com:owner/pagedkv.git", "https://github.com/owner/pagedkv"),
        ("ssh://git@git.example.org/owner/pagedkv", "https://git.example.org/owner/pagedkv"),
        ("https://github.com/owner/pagedkv/", "https://github.com/owner/pagedkv"),
        ("https://me:secret@gitlab.com/a/b/c.git", "https://gitlab.com/a/b/c"),
        ("/srv/git/pagedkv.git", None),
    ],
)
def test_a_remote_has_a_page_where_it_has_an_address_on_the_web(origin, page, monkeypatch):
    monkeypatch.setattr(overhead, "git", lambda *args: origin)
    assert overhead.origin() == page


def test_a_repository_without_an_origin_has_no_page(monkeypatch):
    def fail(*args):
        raise UserError("git remote: no such remote")

    monkeypatch.setattr(overhead, "git", fail)
    assert overhead.origin() is None


def test_it_opens_with_the_machine_of_make_table_and_ends_with_retired_ones():
    series = overhead.gather(RESULTS)["series"]
    assert series[0]["machine"] == default_machine(RESULTS)[0]
    assert [one["machine"] for one in series if one["retired"]] == [series[-1]["machine"]]


def test_it_opens_with_this_hosts_own_machine_that_measured_last_and_says_so(monkeypatch):
    own = min(machines(RESULTS), key=lambda machine: machine == default_machine(RESULTS)[0])
    monkeypatch.setattr(results, "own_machines", lambda: set())
    assert overhead.gather(RESULTS)["opens"] == overhead.MOST
    monkeypatch.setattr(results, "own_machines", lambda: {own})
    monkeypatch.setattr(results, "last_run", lambda machine, folder: machine == own)
    data = overhead.gather(RESULTS)
    assert (data["series"][0]["machine"], data["opens"]) == (own, overhead.OWN)


def test_the_page_is_one_file_that_asks_for_nothing():
    data = overhead.gather(RESULTS)
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


def test_plugins_need_asv_and_jsonschema_alone():
    """On a machine without network there are asv, jsonschema, MLX and a commit's pagedkv."""
    blocked = ("vl_convert", "pagedkv", "mlx", "numpy")
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
    monkeypatch.setattr(overhead, "gather", lambda *args: {"series": [], "regressions": []})
    conf = type("Conf", (), {"html_dir": str(tmp_path), "results_dir": ""})
    with pytest.raises(UserError, match="#/regressions"):
        OverheadPage.publish(conf, None, {}, [], {})


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
