"""Open the published site in a headless Chromium that reaches nothing but it, and look.

`make screenshot` takes the README's picture of it.

Needs a Chromium (Debian: `apt-get install chromium`) and the dependency group `browser`.
"""

import argparse
import contextlib
import functools
import shutil
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlencode

sys.path.insert(0, str(Path(__file__).parents[1]))

from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import sync_playwright

from tracking.repository import ROOT
from tracking.results import STEP

BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)

# Points of every series that flot has drawn into the graph, once it has.
SERIES = """() => {
  const canvas = document.querySelector('#main-graph canvas.flot-base');
  const plot = window.jQuery && jQuery('#main-graph').data('plot');
  if (!canvas || !plot) return null;
  return plot.getData().map(series => [series.label, series.data.filter(p => p && p[1] !== null)]);
}"""
INK = """() => {
  const canvas = document.querySelector('#main-graph canvas.flot-base');
  const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  const colours = new Set();
  for (let i = 0; i < pixels.length; i += 4)
    if (pixels[i + 3]) colours.add((pixels[i] << 16) | (pixels[i + 1] << 8) | pixels[i + 2]);
  return colours.size;
}"""


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def serve(directory):
    """Serve a directory on a free loopback port; return (server, address)."""
    handler = functools.partial(_Quiet, directory=str(directory))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"


@contextlib.contextmanager
def browse(html_dir, **options):
    """Open a browser that reaches nothing but `html_dir`; yield a page and the address of the site.

    Raises RuntimeError at the end if the page asked for anything else, or reported an error.
    """
    browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser_path is None:
        raise RuntimeError(f"expected a browser, found none of {', '.join(BROWSERS)}")
    server, address = serve(html_dir)
    problems = []

    def only_here(route):
        if route.request.url.startswith((address, "data:", "blob:", "file:")):
            route.continue_()
        else:
            problems.append(f"asked for {route.request.url}")
            route.abort()

    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=browser_path,
                args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
            )
            page = browser.new_page(**{"viewport": {"width": 1280, "height": 800}, **options})
            page.route("**/*", only_here)
            page.on("response", lambda r: r.ok or problems.append(f"got {r.status} for {r.url}"))
            page.on("pageerror", lambda error: problems.append(f"script error: {error}"))
            yield page, address
            browser.close()
    except PlaywrightError as error:
        raise RuntimeError(f"{html_dir}: {'; '.join([*problems, str(error)])}") from error
    finally:
        server.shutdown()
        server.server_close()
    if problems:
        raise RuntimeError(f"{html_dir}: " + "; ".join(problems))


def look(html_dir, machine=None):
    """Open the graph of the step's ratio over commits, return its series {label: points}.

    Raises RuntimeError if the page asks for anything that is not in `html_dir`, reports a script
    error, or draws nothing.
    """
    state = [("machine", machine)] if machine else []
    state += [("p-block_size", 32), ("p-context", 1024), ("p-context", 4096)]
    with browse(html_dir) as (page, address):
        page.goto(f"{address}/index.html#{STEP}?{urlencode(state)}")
        page.wait_for_function(f"() => ({SERIES})()?.some(s => s[1].length)", timeout=20000)
        series = page.evaluate(SERIES)
        if page.evaluate(INK) < 3:
            raise RuntimeError(f"{html_dir}: the graph's canvas is blank")
    return dict(series)


class OverheadPage:
    """The overhead page in a browser: choose, and read what it says."""

    def __init__(self, page):
        self.page = page

    def open(self, url, **choices):
        """Go to the page with choices in its address."""
        self.page.goto("about:blank")
        self.page.goto(f"{url}#{urlencode(choices)}")
        self.await_shown(choices)

    def choose(self, name, value):
        """Choose from one of the page's menus."""
        self.page.select_option(f"#{name}", value)
        self.await_shown({name: value})

    def await_shown(self, choices):
        """Wait until the page shows some choices."""
        wanted = list(map(str, choices.values()))
        self.page.wait_for_function(
            "wanted => { const shown = document.body.dataset.shown;"
            " return shown && wanted.every(w => ` ${shown} `.includes(` ${w} `)); }",
            arg=wanted,
            timeout=20000,
        )

    def chosen(self):
        """Return what every menu shows, by the menu's name."""
        return self.page.eval_on_selector_all(
            "select", "all => Object.fromEntries(all.map(one => [one.id, one.value]))"
        )

    def options(self, name):
        """Return the values that a menu offers."""
        return self.page.eval_on_selector_all(f"#{name} option", "all => all.map(o => o.value)")

    def text(self, selector):
        """Return the text of an element."""
        return self.page.inner_text(selector)

    def visible(self, selector):
        """Return whether any such element is visible."""
        return self.page.locator(f"{selector} >> visible=true").count() > 0

    def table(self, name):
        """Return a table's rows as lists of text."""
        return self.page.evaluate(
            "id => [...document.getElementById(id).rows].map("
            "row => [...row.cells].map(c => c.innerText.trim()))",
            name,
        )

    def links(self, name):
        """Return where the numbers of a table lead."""
        return self.page.eval_on_selector_all(f"#{name} a", "all => all.map(a => a.href)")

    def points(self, name):
        """Return how many points a chart has drawn."""
        return self.page.evaluate(
            "id => document.querySelectorAll(`#${id} .mark-symbol.role-mark path`).length", name
        )


def main():
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog=".ci/browser.py", description=__doc__)
    parser.add_argument("screenshot", help="PNG file to write")
    parser.add_argument("--html-dir", default=ROOT / ".asv/html", type=Path)
    parser.add_argument("--machine", required=True, help="which machine the page shows")
    parser.add_argument("--batch", required=True, help="and which batch")
    args = parser.parse_args()
    try:
        with browse(args.html_dir, viewport={"width": 1000, "height": 1000}) as (page, address):
            shown = {"machine": args.machine, "batch": args.batch}
            OverheadPage(page).open(f"{address}/overhead.html", **shown)
            page.screenshot(path=args.screenshot)
    except RuntimeError as error:
        sys.exit(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
