"""The overhead page in a browser: what it says, and how it is used.

Needs the dependency group `browser` and a Chromium; `make prove` has both.
"""

import json
import re
import sys
from urllib.parse import parse_qs, urlsplit

import pytest

pytest.importorskip("playwright")

from tracking.repository import ROOT
from tracking.results import RESULTS, STEP, default_machine, machines, measured, measured_commits
from website.overhead import gather, page

sys.path.insert(0, str(ROOT / ".ci"))
from browser import OverheadPage, browse

CPU = "linux-2core-xeon"


@pytest.fixture(scope="module")
def recorded():
    return gather(RESULTS)


@pytest.fixture(scope="module")
def site(recorded, tmp_path_factory):
    before, after = measured_commits(CPU)[-2:]
    cell = {"name": f"{STEP}(1, 1024, 32)", "machine": CPU, "factor": 1.5, "accepted": None}
    cell |= {"from": before, "to": after, "commit": after[:8], "subject": "Slow it down"}
    accepted = cell | {"factor": 1.4, "accepted": {"reason": "worth it", "link": "docs/a.md"}}
    found = [cell, accepted, cell | {"machine": "h100", "factor": 1.25}]
    folder = tmp_path_factory.mktemp("site")
    data = recorded | {"regressions": found, "repository": "https://x"}
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


def chosen(overhead):
    """What every menu shows, by the menu's name."""
    return overhead.page.eval_on_selector_all(
        "select", "all => Object.fromEntries(all.map(one => [one.id, one.value]))"
    )


def test_it_opens_with_the_machine_of_make_table_and_the_chart_of_steps_above_the_fold(at):
    overhead = at()
    assert chosen(overhead)["machine"] == default_machine(RESULTS)[0]
    assert overhead.text("#title").startswith("Decode step by phase")
    assert not overhead.page.is_visible("#notice")
    assert "most headline numbers at its newest commit" in overhead.text("dl")
    box = overhead.page.locator("#phases svg").bounding_box()
    assert box["y"] + box["height"] <= 800
    tops = {card.bounding_box()["y"] for card in overhead.page.locator("#cards button").all()}
    assert len(tops) == 1


@pytest.mark.parametrize("name", ["machine", "commit", "against", "batch", "block"])
def test_every_choice_is_in_the_address_and_can_be_gone_back_from(at, name):
    overhead = at(machine="h200", commit="0b9e8013")
    before = chosen(overhead)
    options = overhead.page.eval_on_selector_all(f"#{name} option", "all => all.map(o => o.value)")
    other = [value for value in options if value != before[name]][-1:] or options
    overhead.page.select_option(f"#{name}", other[0])
    overhead.await_shown({name: other[0]})
    after, address = chosen(overhead), overhead.page.url
    assert parse_qs(urlsplit(address).fragment)[name] == other
    if other[0] != before[name]:
        overhead.page.go_back()
        overhead.page.wait_for_function(
            "([name, value]) => document.getElementById(name).value === value",
            arg=[name, before[name]],
        )
    overhead.page.goto("about:blank")
    overhead.page.goto(address)
    overhead.await_shown({name: other[0]})
    assert chosen(overhead) == after


def test_a_card_chooses_what_is_shown(at):
    overhead = at(machine="h100")
    overhead.page.click("#tokens-card")
    overhead.await_shown({"measure": "tokens"})
    assert "measure=tokens" in overhead.page.url
    assert overhead.text("#title").startswith("Tokens per second by phase")
    assert overhead.page.get_attribute("#tokens-card", "aria-pressed") == "true"


def test_a_card_without_a_number_shows_the_newest_there_is_greyed(at):
    overhead = at(machine="h100", commit="4afb951c", batch=1)
    classes = overhead.page.get_attribute("#tokens-card", "class")
    assert "old" in classes
    assert "9 · groups, 2026-" in overhead.text("#tokens-card")
    assert "not measured\nno run requested it" in overhead.text("#first-card")
    assert not overhead.page.get_attribute("#step-card", "class")
    assert "10 · bits, 2026-" in overhead.text("#step-card")


def test_what_is_not_there_is_said_and_not_replaced_in_silence(at):
    overhead = at()
    shown = chosen(overhead)["machine"]
    overhead.page.evaluate("location.hash = 'machine=nosuch&batch=77'")
    overhead.page.wait_for_selector("#notice:visible")
    said = overhead.text("#notice")
    assert f"No machine nosuch here; showing {shown}." in said
    assert "No batch 77 here" in said
    overhead.page.select_option("#batch", "4")
    overhead.await_shown({"batch": 4})
    assert not overhead.page.is_visible("#notice")


@pytest.mark.parametrize("machine", machines(RESULTS))
def test_nothing_empty_is_shown_and_nothing_sticks_out_on_a_phone(at, machine):
    """No frame without a line of two points, no header without a row."""
    at().page.set_viewport_size({"width": 390, "height": 800})
    for commit in measured_commits(machine)[::4]:
        for measure in ("first", "tokens", "memory", "step", "bound", "attention"):
            overhead = at(machine=machine, commit=commit[:8], measure=measure)
            overhead.page.set_viewport_size({"width": 390, "height": 800})
            empty = overhead.page.evaluate(
                """() => {
  const visible = name =>
    [...document.querySelectorAll(name)].filter(part => part.checkVisibility());
  const count = (chart, name) => chart.querySelectorAll(name).length;
  return [
    ...visible(".chart").filter(one => !count(one, ".mark-line.role-mark path")
      || count(one, ".mark-symbol.role-mark path") < 2),
    ...visible("table").filter(one => one.rows.length < 2),
  ].map(one => one.id);
}"""
            )
            assert empty == []
            assert overhead.page.evaluate("document.documentElement.scrollWidth") <= 390
            assert not re.search(r"\de[+-]\d|NaN|Infinity|undefined", overhead.text("body"))


def test_letters_can_be_read_and_menus_are_not_cut(at):
    overhead = at(machine="h100")
    small = overhead.page.evaluate(
        """() => [...document.querySelectorAll("body *")].filter(one =>
  one.checkVisibility() && [...one.childNodes].some(node => node.nodeType === 3 && node.data.trim())
  && !["SCRIPT", "STYLE"].includes(one.tagName) && parseFloat(getComputedStyle(one).fontSize) < 12)
  .map(one => one.outerHTML)"""
    )
    assert small == []
    cut = overhead.page.eval_on_selector_all(
        "select", "all => all.filter(s => s.scrollWidth > s.clientWidth).map(s => s.id)"
    )
    assert cut == []


def test_dark_and_print(at):
    overhead = at(machine=CPU)
    colours = "[getComputedStyle(document.querySelector('#phases svg text')).fill,"
    colours += "getComputedStyle(document.body).backgroundColor]"
    light = overhead.page.evaluate(colours)
    try:
        overhead.page.emulate_media(color_scheme="dark")
        assert overhead.page.evaluate(colours) == ["rgb(228, 232, 238)", "rgb(20, 24, 30)"]
        overhead.page.emulate_media(color_scheme="dark", media="print")
        assert overhead.page.evaluate(colours) == light
        assert not overhead.page.is_visible("#choices")
    finally:
        overhead.page.emulate_media(color_scheme="light", media="screen")


def test_a_measurement_has_its_date_commit_path_and_noise(at):
    overhead = at(machine="h200", measure="first")
    assert "mlx-lm against itself gave 0." in overhead.text("#proof")
    assert "which one ran was not recorded" in overhead.text("#proof")
    header, newest, *_ = overhead.table("phases-table")
    assert (header[0], header[-1], newest[-1][:5]) == ("commit", "measured", "2026-")
    hash_ = next(c for c in measured_commits("h200")[::-1])
    link = overhead.page.get_attribute("#phases-table tr:nth-child(2) th a", "href")
    assert link == f"https://x/commit/{hash_}"
    assert "Last run: 2026-" in overhead.text("#about")
    assert "checked to run the path it names" in at(machine="h200", measure="attention").text(
        "#proof"
    )
    tip = overhead.page.get_attribute("#phases-table abbr", "title")
    assert tip == "±5.0%, a guess: no runs of identical code are recorded on this machine"


def test_times_are_there_on_demand(at):
    overhead = at(machine=CPU, commit="7ac99062")
    assert not overhead.page.is_visible("#absolute-table")
    overhead.page.click("#absolute summary")
    header, *rows = overhead.table("absolute-table")
    assert header[:2] == ["batch, tokens", "auto"]
    assert re.fullmatch(r"[\d.]+ \[[\d.]+, [\d.]+\] [\d.]+ GB/s", rows[0][1])
    assert "asv stores the ratio alone" in at(machine="h100").page.text_content("#absolute-note")


def test_numbers_lead_to_one_series_of_asv(at):
    overhead = at(machine="h200", measure="attention", batch=4)
    href = overhead.page.get_attribute("#phases-table td a", "href")
    name, _, state = urlsplit(href).fragment.partition("?")
    assert name == "overhead.Auto.ratio_vs_contiguous"
    asked = {"machine": ["h200"], "mlx": ["0.32.4"], "p-batch": ["4"], "p-block_size": ["32"]}
    assert asked.items() <= parse_qs(state).items()
    link = overhead.page.get_attribute("a:text-is('List')", "href")
    _, _, state = urlsplit(link).fragment.partition("?")
    assert parse_qs(state) == {key: [value] for key, value in measured("h200")[-1].params.items()}


def test_regressions_are_of_the_machine_and_lead_to_the_diff(at):
    overhead = at(machine=CPU)
    before, after = measured_commits(CPU)[-2:]
    text = overhead.text("#regressions")
    assert "Slow it down. 1 cell, worst 1.50" in text
    assert "Accepted: worth it" in text
    assert "1.25" not in text
    overhead.page.click("#regressions summary >> nth=0")
    assert f"git diff {before[:8]} {after[:8]} -- pagedkv" in overhead.text("#regressions")
    links = overhead.page.eval_on_selector_all("#regressions a", "all => all.map(a => a.href)")
    assert links[0] == f"https://x/compare/{before}...{after}"
    assert any(link.endswith("/docs/docs/a.html") for link in links)
    overhead.page.click("#regressions details a >> nth=1")
    overhead.await_shown({"commit": after[:8], "against": before[:8]})
    assert "1.25" in at(machine="h100").text("#regressions")
    assert at(machine="h200").text("#regressions").startswith("None on h200 among series")
    assert "is retired, so none are reported: an older record" in at(machine="linux-2core").text(
        "#regressions"
    )


def made_up(recorded, site, values, **of_second):
    """A page of one series of steps at two commits, with the two compared."""
    overhead, address, folder = site
    contexts = [1024 * 2**i for i in range(len(values))]
    step = {"name": STEP, "measure": "step", "path": "auto", "values": values}
    step["thresholds"] = [[1.05, "±5.0%, a guess"]] * len(values)
    step |= {"params": ["batch", "context", "block_size"], "host": [[False] * 2] * len(values)}
    step |= {"cells": [[1, c, 32] for c in contexts], "asked": [["1", c, "32"] for c in contexts]}
    one = json.loads(json.dumps(recorded["series"][0]))
    one |= {"measures": [step], "facts": [], "commits": one["commits"][:2]}
    one["commits"][1]["with"] |= of_second
    (folder / "made.html").write_text(page(recorded | {"series": [one]}))
    overhead.open(f"{address}/made.html")
    return overhead


def test_two_commits_are_compared_and_so_is_what_measured_them(recorded, site):
    one = [1.0, 0.98, 1.02]
    values = [
        [one, [0.5, 0.49, 0.51]],  # half the time
        [one, [1.3, 1.28, 1.32]],
        [one, [1.03, 1.025, 1.04]],  # apart, and by less than the threshold
        [one, [1.3, 1.0, 1.6]],  # far, and not apart
        [one, [1.5]],
        [one, "failed"],
    ]
    overhead = made_up(recorded, site, values, driver="570.1")
    words = overhead.page.eval_on_selector_all(
        "#compare td[title]:nth-child(4)", "all => all.map(one => [one.innerText, one.title])"
    )
    assert [(text.split(" [")[0][2:], word) for text, word in words] == [
        ("0.50", "improved"),
        ("1.30", "worsened"),
        ("1.50", "not judged"),
        ("1.30", "unchanged"),
        ("1.03", "unchanged"),
    ]
    said = overhead.text("#compare-title")
    assert said.endswith("1 improved, 1 worsened, 2 unchanged, 1 not judged.")
    assert overhead.text("#compare-with") == "The environments differ: driver not recorded → 570.1."
    assert overhead.table("phases-table")[1][1][2:6] == "1.05"


@pytest.mark.parametrize(
    ("values", "words", "colour"),
    [
        ([[0.5, 0.49, 0.51]], "half mlx-lm's time", "good"),
        ([[0.41, 0.4, 0.42], [0.6, 0.59, 0.61]], "41\u201360% of mlx-lm's time", "good"),
        ([[1.3, 1.2, 1.4]], "1.30 times mlx-lm's time", "bad"),
        ([[0.9, 0.8, 0.95], [1.3, 1.2, 1.4]], "0.90\u20131.30 times mlx-lm's time", ""),
        ([[1.0, 0.9, 1.1]], "equal to mlx-lm's time", ""),
        ([[0.97, 0.9, 1.1]], "97% of mlx-lm's time", ""),
    ],
)
def test_a_card_says_it_in_words_and_colour(values, words, colour, recorded, site):
    overhead = made_up(recorded, site, [[[1.0, 1.0, 1.0], value] for value in values])
    assert overhead.text("#step-card b") == words
    assert (overhead.page.get_attribute("#step-card b", "class") or "") == colour


def test_nothing_and_an_interval_that_reaches_it_leave_a_chart_its_scale(recorded, site):
    """A logarithm has no place for 0."""

    def axis(overhead):
        return overhead.page.locator("#phases .role-axis").all_text_contents()

    before = [[2.0, 1.9, 2.1], [1.0, 0.9, 1.1]]
    whole = axis(made_up(recorded, site, [before, before]))
    reaching = [[2.0, -3.0, 2.1], [1.0, -3.0, 1.1]]
    overhead = made_up(recorded, site, [before, reaching, [[0, 0, 0], [2, 2, 2]]])
    assert "[-3.00, " in overhead.text("#phases-table")
    assert axis(overhead) == whole
    assert "∞" in overhead.text("#compare")
    assert not re.search("NaN|Infinity", overhead.text("body"))


def test_a_page_without_results_says_so(recorded, site):
    overhead, address, folder = site
    (folder / "empty.html").write_text(page(recorded | {"series": []}))
    overhead.page.goto(f"{address}/empty.html")
    overhead.page.wait_for_selector("#notice:visible")
    assert overhead.text("#notice") == "Nothing has been measured yet: make bench."
