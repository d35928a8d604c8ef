"""The page after years of nights: 500 commits on 4 machines, of made-up numbers."""

import sys
import time

import pytest
from many_results import history, write

from tracking import repository
from tracking.repository import ROOT
from website.overhead import gather, page

MACHINES = ("a", "b", "c", "d")
COMMITS = 500


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return the folder with the page and a small one, and the seconds of this process it took."""
    folder = tmp_path_factory.mktemp("many")
    commits = history(folder / "repository", COMMITS)
    for machine in MACHINES:
        write(folder / "results", machine, commits)
    write(folder / "few", MACHINES[0], commits[:2])
    (folder / "html").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repository, "ROOT", folder / "repository")
        (folder / "html/few.html").write_text(page(gather(folder / "few")))
        html = page(gather(folder / "results"))
    (folder / "html/overhead.html").write_text(html)
    return folder / "html"


def test_it_is_small(built):
    assert (built / "overhead.html").stat().st_size < 5e6


def test_it_is_quick_to_use(built):
    """The best of a few, and three times what two commits take: other work is not the page's."""
    pytest.importorskip("playwright")
    sys.path.insert(0, str(ROOT / ".ci"))
    from browser import OverheadPage, browse

    folder = built
    with browse(folder) as (tab, address):
        overhead = OverheadPage(tab)

        def quickest(*actions):
            seconds = []
            for action in actions:
                started = time.perf_counter()
                action()
                seconds.append(time.perf_counter() - started)
            return min(seconds)

        def opened(name):
            return quickest(*[lambda: overhead.open(f"{address}/{name}.html")] * 5)

        quick = max(1, 3 * opened("few"))
        assert opened("overhead") < quick
        assert len(overhead.options("commit")) == COMMITS
        assert len(overhead.options("machine")) == len(MACHINES)
        choices = [lambda batch=batch: overhead.choose("batch", batch) for batch in "4141"]
        assert quickest(*choices) < quick
        assert quickest(*[lambda m=m: overhead.choose("machine", m) for m in "bcda"]) < quick
        shown = overhead.table("step-phases-table")
        assert len(shown) == 1 + 9 + 30
        assert overhead.text("#step-phases-title").endswith(
            "39 of 500 commits, newest first in the table"
        )
        overhead.choose("span", "all")
        assert len(overhead.table("step-phases-table")) == 1 + COMMITS
