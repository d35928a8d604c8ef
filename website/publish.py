"""asv publish plugin: writes overhead.html and links it from asv's pages.

asv loads plugins for every command, so this one imports what draws the page, and the package, only
when it publishes: measuring needs neither.
"""

import sys
from pathlib import Path

from asv.publishing import OutputPublisher
from asv.util import UserError

NAVIGATION = '<li id="nav-li-regressions">'


class OverheadPage(OutputPublisher):
    """Writes overhead.html and links it from asv's navigation; runs after asv's own pages."""

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
        index = html_dir / "index.html"
        html = index.read_text()
        if html.count(NAVIGATION) != 1:
            raise UserError(f"expected {NAVIGATION} once in asv's index.html")
        link = '<li><a href="overhead.html">Step overhead</a></li>\n\t'
        index.write_text(html.replace(NAVIGATION, link + NAVIGATION))
