"""The overhead page in a browser: what it says, and how it is used.

Needs the dependency group `browser` and a Chromium; `make prove` has both.
"""

import json
import re
import sys
from urllib.parse import parse_qs, urlsplit

import pytest

pytest.importorskip("playwright")

from tracking.repository import ROOT, commit_label
from tracking.results import RESULTS, STEP, load, measured, measured_commits
from tracking.tables import ADR, USERS
from website.charts import PATHS
from website.overhead import gather, page

sys.path.insert(0, str(ROOT / ".ci"))
from browser import OverheadPage, browse

MACHINES = sorted({file.parent.name for file in RESULTS.glob("*/*-*.json")})
CPU = "linux-2core-xeon"
CHOSEN = {"machine": CPU, "batch": 4, "block": 32}


@pytest.fixture(scope="module")
def recorded():
    return gather(RESULTS)


@pytest.fixture(scope="module")
def site(recorded, tmp_path_factory):
    cells = [
        {"name": f"{STEP}(1, 1024, 32)", "machine": CPU, "factor": 1.5},
        {"name": f"{STEP}(4, 1024, 32)", "machine": "h100", "factor": 1.25},
        {"name": f"{STEP}(4, 4096, 32)", "machine": "linux-2core", "factor": 1.2},
    ]
    for cell in cells:
        name, _, values = cell["name"].partition("(")
        sizes = dict(zip(("batch", "context", "block_size"), values[:-1].split(", "), strict=True))
        cell |= {"benchmark": name, "params": sizes}
    before, after = measured_commits(CPU)[-2:]
    cause = {"from": before, "to": after, "after": commit_label(before)}
    cause |= {"commit": commit_label(after), "subject": "Slow it down", "cells": cells}
    accepted = cause | {"cells": cells[:1], "accepted": {"reason": "worth it", "link": "docs/a.md"}}
    causes = [cause | {"accepted": None}, accepted]
    data = recorded | {"regressions": causes, "repository": "https://x"}
    folder = tmp_path_factory.mktemp("site")
    (folder / "overhead.html").write_text(page(data))
    with browse(folder) as (tab, address):
        yield OverheadPage(tab), address, folder


@pytest.fixture
def at(site):
    """Open the page as a reader's address says; return it."""
    overhead, address, _ = site
    overhead.page.set_viewport_size({"width": 1280, "height": 800})

    def open(**choices):
        overhead.open(f"{address}/overhead.html", **choices)
        return overhead

    return open


def test_it_opens_on_the_machine_that_measured_last(at):
    last = {
        machine: max(one.started_at for one in measured(machine))
        for machine in MACHINES
        if not (RESULTS / machine / "retired.txt").exists()
    }
    overhead = at()
    assert overhead.chosen()["machine"] == max(last, key=last.get)
    assert overhead.options("machine")[-1] == "linux-2core"
    assert not overhead.visible("#notice")


@pytest.mark.parametrize(
    "name", ["machine", "commit", "against", "batch", "block", "path", "span", "columns", "changes"]
)
def test_every_choice_is_in_the_address_and_can_be_gone_back_from(at, name):
    overhead = at(machine="h200", commit="0b9e8013", block=32)
    before = overhead.chosen()
    other = [value for value in overhead.options(name) if value != before[name]][-1]
    overhead.page.evaluate(
        "([name, value]) => { const menu = document.getElementById(name); menu.value = value;"
        " menu.dispatchEvent(new Event('change')); }",
        [name, other],
    )
    overhead.await_shown({name: other})
    after = overhead.chosen()
    assert after[name] == other
    address = overhead.page.url
    assert parse_qs(urlsplit(address).fragment)[name] == [other]
    overhead.page.go_back()
    overhead.await_shown({name: before[name]})
    assert overhead.chosen() == before
    overhead.page.go_forward()
    overhead.await_shown({name: other})
    overhead.page.goto("about:blank")
    overhead.page.goto(address)
    overhead.await_shown({name: other})
    assert overhead.chosen() == after


def test_an_address_changed_in_an_open_tab_is_followed(at):
    overhead = at(**CHOSEN)
    overhead.page.evaluate("location.hash = 'machine=h200&batch=1'")
    overhead.await_shown({"machine": "h200", "batch": 1})
    assert overhead.chosen()["batch"] == "1"


def test_what_is_not_there_is_said_and_not_replaced_in_silence(at):
    overhead = at()
    shown = overhead.chosen()["machine"]
    overhead.page.evaluate("location.hash = 'machine=nosuch&batch=77'")
    overhead.page.wait_for_selector("#notice:visible")
    said = overhead.text("#notice")
    assert f"There is no machine nosuch here: shown is {shown}." in said
    assert "There is no batch 77 here" in said
    overhead.choose("batch", "4")
    assert not overhead.visible("#notice")
    commit = next(x for x in measured_commits(CPU) if x not in measured_commits("h200"))[:8]
    overhead.choose("machine", CPU)
    overhead.choose("commit", commit)
    overhead.choose("machine", "h200")
    now = overhead.chosen()["commit"]
    assert now != commit
    assert overhead.text("#notice") == f"There is no commit {commit} here: shown is {now}."


def test_it_is_used_with_the_keyboard(at):
    overhead = at(**CHOSEN)
    keys = overhead.page.keyboard
    overhead.page.focus("#machine")
    for _ in range(3):
        keys.press("Tab")
    assert overhead.page.evaluate("document.activeElement.id") == "batch"
    keys.press("ArrowUp")
    overhead.await_shown({"batch": "1"})
    assert overhead.page.evaluate("document.activeElement.id") == "batch"
    overhead.page.focus("#table th:nth-child(2) button")
    keys.press("Enter")
    keys.press("Enter")
    sorted_by = overhead.page.locator("#table th[aria-sort]")
    assert sorted_by.get_attribute("aria-sort") == "descending"
    contexts = [int(row[1]) for row in overhead.table("table")[1:]]
    assert contexts == sorted(contexts, reverse=True)


def test_the_cards_are_about_what_is_chosen(at):
    def range_at(commit, batch):
        cells = load(CPU, commit)[STEP].items()
        known = [x.value for cell, x in cells if cell[0] == batch and x.known]
        return "\u2013".join(f"{end:.2f}" for end in (min(known), max(known)))

    commits = [c for c in measured_commits(CPU) if load(CPU, c).get(STEP)]
    oldest, newest = commits[0], commits[-1]
    for batch in ("1", "4"):
        said = at(**CHOSEN | {"batch": batch, "commit": newest[:8]}).text("#step-card").splitlines()
        assert said[1] == range_at(newest, batch)
        assert said[3] == f"{range_at(oldest, batch)} at 0 · gather → {range_at(newest, batch)} now"


def test_the_worst_cell_selects_itself(at):
    overhead = at(machine="h100", commit="b5592642", batch=1)
    worst = re.search(
        r"worst cell (.*): batch (\d+), (\d+) tokens", overhead.text("#attention-card")
    )
    number, batch, _ = worst.groups()
    assert batch != "1"
    overhead.page.click("#attention-card button")
    overhead.await_shown({"batch": batch})
    assert overhead.text("#attention-now td.picked").startswith(number)
    assert overhead.page.evaluate("document.activeElement.textContent") == number


@pytest.mark.parametrize("machine", MACHINES)
def test_nothing_empty_is_shown(at, machine):
    """No frame without a line, no line without two points, no header without a row."""
    for commit in measured_commits(machine)[::3]:
        overhead = at(machine=machine, commit=commit[:8])
        for batch in overhead.options("batch"):
            overhead.choose("batch", batch)
            empty = overhead.page.evaluate(
                """() => {
  const visible = part => part.checkVisibility();
  const charts = [...document.querySelectorAll(".chart")].filter(visible);
  const tables = [...document.querySelectorAll("table")].filter(visible);
  const lines = chart => chart.querySelectorAll(".mark-line.role-mark path").length;
  const legend = chart => chart.querySelectorAll(".role-legend-label text").length;
  const points = chart => chart.querySelectorAll(".mark-symbol.role-mark path").length;
  return [
    ...charts.filter(one => !lines(one) || lines(one) !== legend(one)
                            || points(one) < 2 * lines(one)),
    ...tables.filter(one => one.rows.length < (one.className === "facts" ? 1 : 2)),
  ].map(one => one.id);
}"""
            )
            assert empty == []


def test_what_was_not_measured_says_why(at):
    overhead = at(machine="h200", batch=4)
    assert "Not measured on this machine: no run asked for it." in overhead.text("#bound")
    overhead = at(machine="h200", batch=4, commit="fae881ef")
    assert "not measured, no run asked for it. It was at 6 · fused." in overhead.text("#attention")
    overhead.page.click("#attention-now-title button")
    overhead.await_shown({"commit": "0b9e8013"})
    assert overhead.table("attention-now")[0][0] == "batch"


def test_the_table_leads_with_what_users_get_and_has_the_adrs_columns(at):
    overhead = at(machine="h100", commit="b5592642")
    titles = ["batch", "context", "block"]
    first, *measured = (column.title for column in USERS)
    assert overhead.table("table")[0] == [*titles, *measured]
    assert f"Not measured at 8 · mlx-lm (b5592642): {first}." in overhead.text("#table-title")
    overhead = at(machine="linux-2core", commit="ac3438f7", columns="adr")
    header, *rows = overhead.table("table")
    assert header == [*titles, *(column.title for column in ADR)]
    assert rows[0][:5] == ["1", "1024", "16", "0.0", "15.52"]
    with overhead.page.expect_download() as download:
        overhead.page.click("#csv")
    with open(download.value.path()) as file:
        assert file.read() == "".join(",".join(row) + "\n" for row in [header, *rows])
    overhead = at(machine=CPU)
    assert "tokens a second over mlx-lm's" not in overhead.table("table")[0]
    assert "Not measured at" in overhead.text("#table-title")


def test_the_newest_commit_comes_first_and_stays_named(at):
    overhead = at(**CHOSEN)
    rows = overhead.table("step-phases-table")
    assert rows[1][0].startswith("7 · step (")
    assert rows[-1][0].startswith("0 · gather (")
    overhead.page.set_viewport_size({"width": 390, "height": 800})
    overhead = at(machine="h100", batch=1)
    left, cue = overhead.page.evaluate(
        """() => {
  const table = document.getElementById("step-phases-table"), box = table.parentElement;
  box.scrollLeft = 200;
  return [table.rows[1].cells[0].getBoundingClientRect().left - box.getBoundingClientRect().left,
          box.classList.contains("more") && box.tabIndex === 0];
}"""
    )
    assert left == 0
    assert cue


@pytest.mark.parametrize("machine", ["h100", "h200", CPU, "linux-2core"])
def test_nothing_sticks_out_on_a_phone(at, machine):
    overhead = at()
    overhead.page.set_viewport_size({"width": 390, "height": 800})
    overhead = at(machine=machine)
    assert overhead.page.evaluate("document.documentElement.scrollWidth") <= 390
    if machine == "h100":
        right = overhead.page.evaluate(
            "document.getElementById('tokens-facts').getBoundingClientRect().right"
        )
        assert right <= 390


def test_letters_can_be_read_and_numbers_have_no_powers_of_ten(at):
    for choices in ({"machine": "h100"}, {"machine": "h200", "commit": "0b9e8013"}, CHOSEN):
        overhead = at(**choices)
        small = overhead.page.evaluate(
            """() => [...document.querySelectorAll("body *")].filter(one =>
  one.checkVisibility() && [...one.childNodes].some(node => node.nodeType === 3 && node.data.trim())
  && !["SCRIPT", "STYLE"].includes(one.tagName) && parseFloat(getComputedStyle(one).fontSize) < 12)
  .map(one => one.outerHTML)"""
        )
        assert small == []
        assert not re.search(r"\de[+-]\d", overhead.text("body"))


def test_a_path_has_its_colour_in_every_chart(at):
    overhead = at(machine=CPU, commit="7ac99062", batch=4)
    found = overhead.page.evaluate(
        """() => ["contexts", "bandwidths"].flatMap(id => {
  const legend = document.querySelector(`#${id} .role-legend`);
  const texts = [...legend.querySelectorAll(".role-legend-label text")].map(t => t.textContent);
  const marks = [...legend.querySelectorAll(".role-legend-symbol path")];
  return texts.map((text, i) => [text, marks[i].getAttribute("fill") === "transparent"
    ? marks[i].getAttribute("stroke") : marks[i].getAttribute("fill")]);
})"""
    )
    assert len(found) > 8
    assert all(PATHS[path] == colour for path, colour in found)


def test_dark_and_print(at):
    overhead = at(**CHOSEN)
    colour = "getComputedStyle(document.querySelector('#step-phases svg text')).fill"
    ground = "getComputedStyle(document.body).backgroundColor"
    light = overhead.page.evaluate(f"[{colour}, {ground}]")
    overhead.page.emulate_media(color_scheme="dark")
    dark = overhead.page.evaluate(f"[{colour}, {ground}]")
    try:
        assert light == ["rgb(28, 36, 48)", "rgb(255, 255, 255)"]
        assert dark == ["rgb(228, 232, 238)", "rgb(20, 24, 30)"]
        overhead.page.emulate_media(color_scheme="dark", media="print")
        assert overhead.page.evaluate(f"[{colour}, {ground}]") == light
        assert not overhead.visible("#choices")
        assert not overhead.visible("#csv")
        assert f"{CPU}, 7 · step" in overhead.text("#printed")
        assert "batch 4, blocks of 32 tokens" in overhead.text("#printed")
    finally:
        overhead.page.emulate_media(color_scheme="light", media="screen")


def test_numbers_lead_to_one_series_of_asv(at):
    overhead = at(machine="h200", commit="0b9e8013", batch=4)
    link = urlsplit(overhead.links("attention-now")[0]).fragment
    name, _, state = link.partition("?")
    assert name == "overhead.Auto.ratio_vs_contiguous"
    asked = {"machine": ["h200"], "mlx": ["0.32.4"], "python": ["3.12"], "p-batch": ["1"]}
    asked |= {"p-context": ["1024"], "p-block_size": ["32"]}
    assert asked.items() <= parse_qs(state).items()


def test_asvs_list_is_asked_for_all_that_a_machine_is(at):
    """It shows the machine that differs least from what it was asked for, whatever its name."""
    overhead = at(machine="h200", commit="0b9e8013")
    link = overhead.page.get_attribute("a:text-is('List')", "href")
    page, _, state = urlsplit(link).fragment.partition("?")
    assert page == "/summarylist"
    params = measured("h200")[-1].params
    assert parse_qs(state) == {name: [value] for name, value in params.items()}


def test_regressions_are_of_the_machine_and_lead_to_the_diff(at):
    overhead = at(machine=CPU)
    overhead.page.click("#regressions summary >> nth=0")
    text = overhead.text("#regressions")
    assert "Slow it down. 1 cell, worst 1.50" in text
    assert "1.25" not in text
    before, after = measured_commits(CPU)[-2:]
    assert f"git diff {before[:8]} {after[:8]} -- pagedkv" in text
    links = overhead.page.eval_on_selector_all("#regressions a", "all => all.map(a => a.href)")
    assert links[0] == f"https://x/compare/{before}...{after}"
    assert text.endswith("Accepted: worth it")
    assert links[2].endswith("/docs/docs/a.html")
    assert parse_qs(urlsplit(links[1]).fragment.partition("?")[2])["p-context"] == ["1024"]
    overhead.page.click("#regressions button >> nth=0")
    overhead.await_shown({"commit": after[:8], "against": before[:8]})
    assert "1.25" in at(machine="h100").text("#regressions")
    assert at(machine="h200").text("#regressions").startswith("None on h200 in series")
    assert "which is retired: an older record" in at(machine="linux-2core").text("#regressions")


def cell_values():
    interval = [1.0, 0.98, 1.02]
    return [
        [interval, [0.5, 0.49, 0.51]],  # half the time
        [interval, [1.3, 1.28, 1.32]],
        [interval, [1.03, 1.025, 1.04]],  # apart, and by less than the threshold
        [interval, [1.3, 1.0, 1.6]],  # far, and not apart
        [interval, [1.5]],
        [interval, "failed"],
    ]


def compared(recorded, site, values):
    """A page of one series of steps at two commits, with the two compared."""
    overhead, address, folder = site
    contexts = [1024 * 2**i for i in range(len(values))]
    step = {"name": STEP, "measure": "step", "path": "auto", "values": values}
    step["thresholds"] = [[1.05, "±5.0%, a guess"]] * len(values)
    step |= {"params": ["batch", "context", "block_size"], "cells": [[1, c, 32] for c in contexts]}
    one = json.loads(json.dumps(recorded["series"][0]))
    one |= {"benchmarks": [step], "commits": one["commits"][:2]}
    data = recorded | {"series": [one], "colours": {str(c): "#123456" for c in contexts}}
    (folder / "compared.html").write_text(page(data))
    first, second = (commit["hash"][:8] for commit in one["commits"])
    overhead.open(f"{address}/compared.html", commit=second, against=first, changes="all")
    return overhead


def rows_compared(overhead):
    return {row[0].split(", ")[1]: row[3::2] for row in overhead.table("compare-table")[1:]}


def test_two_commits_are_compared(recorded, site):
    overhead = compared(recorded, site, cell_values())
    assert rows_compared(overhead) == {
        "1024 tokens": ["\u221250%", "improved"],
        "2048 tokens": ["+30%", "worsened"],
        "4096 tokens": ["+3%", "unchanged"],
        "8192 tokens": ["+30%", "unchanged"],
        "16384 tokens": ["+50%", "not judged"],
    }
    assert overhead.text("#compare-title").endswith(
        "Mixed: 1 number improved by \u221250%, 1 worsened by +30%, 2 unchanged, "
        "1 without an interval."
    )
    assert {row[4] for row in overhead.table("compare-table")[1:]} == {"±5%?"}
    overhead.choose("changes", "changed")
    assert len(overhead.table("compare-table")) == 3


def test_a_comparison_with_nothing_has_a_verdict(recorded, site):
    nothing, two = [0, 0, 0], [2, 2, 2]
    overhead = compared(recorded, site, [[nothing, nothing], [nothing, two], [two, nothing]])
    assert rows_compared(overhead) == {
        "1024 tokens": ["+0%", "unchanged"],
        "2048 tokens": ["+∞%", "worsened"],
        "4096 tokens": ["\u2212100%", "improved"],
    }
    assert overhead.text("#compare-title").endswith(
        "Mixed: 1 number improved by \u2212100%, 1 worsened by +∞%, 1 unchanged."
    )


def test_a_cell_of_nothing_is_in_no_chart_of_factors(recorded, site):
    """A logarithm has no place for 0."""
    one = json.loads(json.dumps(next(s for s in recorded["series"] if s["machine"] == CPU)))
    for benchmark in one["benchmarks"]:
        if benchmark["measure"] in ("step", "time"):
            benchmark["values"] = [
                [[0, 0, 0] if isinstance(v, list) else v for v in row]
                for row in benchmark["values"]
            ]
    overhead, address, folder = site
    (folder / "nothing.html").write_text(page(recorded | {"series": [one]}))
    overhead.open(f"{address}/nothing.html", machine=CPU)
    assert "0.00" in overhead.text("#step-now")
    assert overhead.points("attention-phases") > 0
    assert not overhead.visible("#step-phases")
    assert not overhead.visible("#bandwidths")
    assert not re.search("NaN|Infinity", overhead.text("body"))


def test_an_interval_that_reaches_nothing_leaves_a_chart_its_scale(recorded, site):
    """A few noisy samples, whose mean less its error is below 0."""
    one = json.loads(json.dumps(next(s for s in recorded["series"] if s["machine"] == CPU)))
    overhead, address, folder = site
    overhead.open(f"{address}/overhead.html", machine=CPU)
    before = overhead.text("#attention-phases")
    for benchmark in one["benchmarks"]:
        if benchmark["measure"] == "attention":
            for row in benchmark["values"]:
                row[:] = [[v[0], -3.0, v[0] * 1.1] if isinstance(v, list) else v for v in row]
    (folder / "reaching.html").write_text(page(recorded | {"series": [one]}))
    overhead.open(f"{address}/reaching.html", machine=CPU)
    assert "[-3.00, " in overhead.text("#attention-now")
    assert overhead.points("attention-phases") > 0
    assert overhead.text("#attention-phases") == before


def test_words_that_a_stranger_does_not_know_are_explained(at):
    overhead = at(**CHOSEN)
    address = overhead.page.url
    overhead.page.click("#to-words")
    assert overhead.page.url == address
    said = overhead.page.eval_on_selector_all("dt", "all => all.map(one => one.innerText)")
    assert {"cell", "worst cell", "frag %", "phase", "lacks", "too slow"} <= set(said)
    assert "auto: what the package chooses" in overhead.text("#path option")


def test_a_page_without_results_says_so(recorded, site):
    overhead, address, folder = site
    (folder / "empty.html").write_text(page(recorded | {"series": []}))
    overhead.page.goto(f"{address}/empty.html")
    overhead.page.wait_for_selector("#notice:visible")
    assert overhead.text("#notice") == "Nothing has been measured yet: make bench."
