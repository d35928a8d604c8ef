"""asv publish plugin: writes overhead.html, links it from asv's pages, mends their colours.

asv loads plugins for every command, so this one imports what draws the page, and the package, only
when it publishes: measuring needs neither.
"""

import sys
from pathlib import Path

from asv.publishing import OutputPublisher
from asv.util import UserError

# What is written in asv's pages -> what stands there here.
LINK = '<li><a href="overhead.html">Step overhead</a></li>\n\t'
NAVIGATION = '<li id="nav-li-regressions">'
COLOUR = "if (change > 5) {"
CHANGES = {
    "index.html": (NAVIGATION, LINK + NAVIGATION),
    # Its list shows a rise in red, of whatever it is.
    "summarylist.js": (
        COLOUR,
        f"""if ($.asv.main_json.benchmarks[row.name].better === "larger") {{
                    change = -change;
                }}
                {COLOUR}""",
    ),
}


class OverheadPage(OutputPublisher):
    """Writes overhead.html and changes asv's own pages; runs after them."""

    name = "overhead"
    button_label = "Step overhead"
    description = "Decode steps over paged and contiguous caches, by phase, batch and context"
    order = 50

    @classmethod
    def publish(cls, conf, repo, benchmarks, graphs, revisions):
        """Write the page into `conf.html_dir`."""
        # asv has this on its path only while it loads plugins.
        sys.path.insert(0, str(Path(__file__).parents[1]))
        from website.overhead import causes, gather, page

        html_dir = Path(conf.html_dir)
        data = gather(conf.results_dir, causes(html_dir, revisions, benchmarks))
        (html_dir / "overhead.html").write_text(page(data))
        for name, (old, new) in CHANGES.items():
            text = (html_dir / name).read_text()
            if text.count(old) != 1:
                raise UserError(f"expected {old} once in asv's {name}")
            (html_dir / name).write_text(text.replace(old, new))
