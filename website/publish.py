"""asv publish plugins: overhead.html, and asv's own pages with links, colours and local scripts.

asv loads plugins for every command, so this module imports what draws the page, and the package,
only when it publishes: measuring needs neither.
"""

import re
import shutil
import sys
from pathlib import Path

from asv.console import log
from asv.publishing import OutputPublisher
from asv.util import UserError

MODULES = Path(__file__).parent / "node_modules"
# What asv's index.html loads from elsewhere -> the same file in an npm package of package.json.
FILES = {
    "jquery-3.3.1.min.js": "jquery/dist/jquery.min.js",
    "jquery.flot.min.js": "flot/jquery.flot.js",
    "jquery.flot.time.min.js": "flot/jquery.flot.time.js",
    "jquery.flot.selection.min.js": "flot/jquery.flot.selection.js",
    "jquery.flot.categories.min.js": "flot/jquery.flot.categories.js",
    "jquery.flot.orderBars.js": "flot-orderbars/js/jquery.flot.orderBars.js",
    "stupidtable.min.js": "stupid-table-plugin/stupidtable.min.js",
    "md5.min.js": "blueimp-md5/js/md5.min.js",
    "bootstrap.min.js": "bootstrap/dist/js/bootstrap.min.js",
    "bootstrap.min.css": "bootstrap/dist/css/bootstrap.min.css",
}
TAG = re.compile(r"<(?:script|link)[^>]*?(?:src|href)=\"https?://[^\"]*/(?P<file>[^/\"]+)\"[^>]*>")
NAVIGATION = '<a href="#/regressions">Regressions</a>'
COLOUR = "if (change > 5) {"
# What is written in asv's pages -> what stands there here. Its list shows any rise in red.
LARGER = '$.asv.main_json.benchmarks[row.name].better === "larger"'
CHANGES = {
    "index.html": (NAVIGATION, '<a href="overhead.html">Overhead and regressions</a>'),
    "summarylist.js": (COLOUR, f"if ({LARGER}) change = -change;\n{COLOUR}"),
}


def localise(html, vendor):
    """Return a page with each script and style of another host replaced by its copy in `vendor`."""

    def tag(match):
        if match["file"] not in FILES:
            raise UserError(f"asv's page loads {match['file']}, which website/publish.py lacks")
        source = MODULES / FILES[match["file"]]
        shutil.copy(source, vendor / source.name)
        if source.suffix == ".css":
            return f'<link rel="stylesheet" href="vendor/{source.name}">'
        return f'<script src="vendor/{source.name}" onerror="js_load_failure()">'

    return TAG.sub(tag, html)


def localise_index(html_dir):
    """Make asv's page in a folder independent of other hosts, or say what it lacks for that."""
    if not all((MODULES / source).is_file() for source in FILES.values()):
        log.warning(
            "overhead.html is whole. asv's own pages load their scripts from the network: "
            "website/node_modules is incomplete (install npm, `npm ci` in website/)"
        )
        return
    index, vendor = html_dir / "index.html", html_dir / "vendor"
    vendor.mkdir(exist_ok=True)
    index.write_text(localise(index.read_text(), vendor))


class OverheadPage(OutputPublisher):
    """Writes overhead.html and changes asv's own pages; runs after them."""

    name = "overhead"
    button_label = "Overhead"
    description = "What a paged cache costs, by phase, batch and context"
    order = 50

    @classmethod
    def publish(cls, conf, repo, benchmarks, graphs, revisions):
        """Write into `conf.html_dir`."""
        # asv has this on its path only while it loads plugins.
        sys.path.insert(0, str(Path(__file__).parents[1]))
        from website.overhead import gather, origin, page
        from website.regressions import regressions

        html_dir, web = Path(conf.html_dir), origin()
        if web:
            conf.show_commit_url = f"{web}/commit/"  # of asv's index, which is written last
        found = regressions(graphs, benchmarks, revisions, conf.results_dir)
        (html_dir / "overhead.html").write_text(page(gather(conf.results_dir, found, web)))
        for name, (old, new) in CHANGES.items():
            text = (html_dir / name).read_text()
            if text.count(old) != 1:
                raise UserError(f"expected {old} once in asv's {name}")
            (html_dir / name).write_text(text.replace(old, new))
        localise_index(html_dir)
