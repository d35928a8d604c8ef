"""asv publish plugin: the page's scripts and styles come from beside it, so it works offline."""

import re
import shutil
from pathlib import Path

from asv.console import log
from asv.publishing import OutputPublisher
from asv.util import UserError

MODULES = Path(__file__).parent / "node_modules"

# What asv's index.html names elsewhere -> the same file in an npm package of package.json.
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


def localise(html, file_of):
    """Return `html` with each script and stylesheet of another host replaced by a local one.

    Parameters
    ----------
    html : str
        A page.
    file_of : callable
        Name of a file on another host -> path of its local copy, relative to the page.
    """

    def tag(match):
        path = file_of(match["file"])
        if path.endswith(".css"):
            return f'<link rel="stylesheet" href="{path}">'
        return f'<script src="{path}" onerror="js_load_failure()">'

    return TAG.sub(tag, html)


class OfflineAssets(OutputPublisher):
    """Copies the npm files into `vendor/` and rewrites index.html; runs after asv's own pages."""

    name = "offline"
    button_label = "Offline"
    description = "Scripts and styles beside the page"
    order = 100

    @classmethod
    def publish(cls, conf, repo, benchmarks, graphs, revisions):
        """Make the page in `conf.html_dir` independent of other hosts."""
        if not all((MODULES / source).is_file() for source in FILES.values()):
            log.warning(
                "website/node_modules is incomplete, the page loads its scripts from the network; "
                "for an offline page install npm and run `npm ci` in website/"
            )
            return
        html_dir = Path(conf.html_dir)
        vendor = html_dir / "vendor"
        vendor.mkdir(exist_ok=True)

        def copy(file):
            if file not in FILES:
                raise UserError(f"asv's page loads {file}, which website/offline.py does not know")
            source = MODULES / FILES[file]
            shutil.copy(source, vendor / source.name)
            return f"vendor/{source.name}"

        index = html_dir / "index.html"
        index.write_text(localise(index.read_text(), copy))
