"""Open the published site in a headless Chromium that reaches nothing but it; `make screenshot`.

Needs a Chromium (Debian: `apt-get install chromium`) and the dependency group `browser`.
"""

import contextlib
import functools
import shutil
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlencode

from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import sync_playwright

MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", MAC)


@contextlib.contextmanager
def browse(html_dir, width=1280, height=800):
    """Yield a tab and the site's address; RuntimeError if a page asks for more or has an error."""
    browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser_path is None:
        raise RuntimeError(f"expected a browser, found none of {', '.join(BROWSERS)}")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(html_dir))
    SimpleHTTPRequestHandler.log_message = lambda *args: None
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address, problems = f"http://127.0.0.1:{server.server_port}", []

    def only_here(route):
        if route.request.url.startswith((address, "data:", "blob:", "file:")):
            route.continue_()
        else:
            problems.append(f"asked for {route.request.url}")
            route.abort()

    try:
        with sync_playwright() as playwright:
            args = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
            browser = playwright.chromium.launch(executable_path=browser_path, args=args)
            tab = browser.new_page(viewport={"width": width, "height": height})
            tab.route("**/*", only_here)
            tab.on("response", lambda r: r.ok or problems.append(f"got {r.status} for {r.url}"))
            tab.on("pageerror", lambda error: problems.append(f"script error: {error}"))
            yield tab, address
            browser.close()
    except PlaywrightError as error:
        raise RuntimeError(f"{html_dir}: {'; '.join([*problems, str(error)])}") from error
    finally:
        server.shutdown()
        server.server_close()
    if problems:
        raise RuntimeError(f"{html_dir}: " + "; ".join(problems))


class OverheadPage:
    """The overhead page in a browser: choose, and read what it says."""

    def __init__(self, page):
        self.page = page

    def open(self, url, **choices):
        """Go to the page with choices in its address."""
        self.page.goto("about:blank")
        self.page.goto(f"{url}#{urlencode(choices)}")
        self.await_shown(choices)

    def await_shown(self, choices):
        """Wait until the page shows some choices."""
        shown, wanted = "document.body.dataset.shown", list(map(str, choices.values()))
        there = f"all => {shown} && all.every(one => {shown}.split('\\n').includes(one))"
        self.page.wait_for_function(there, arg=wanted, timeout=20000)

    def text(self, selector):
        """Return the text of an element."""
        return self.page.inner_text(selector)

    def table(self, name):
        """Return a table's rows as lists of text."""
        rows = "rows => rows.map(row => [...row.cells].map(cell => cell.innerText.trim()))"
        return self.page.eval_on_selector_all(f"#{name} tr", rows)

    def points(self, name):
        """Return how many points a chart has drawn."""
        return self.page.locator(f"#{name} .mark-symbol.role-mark path").count()


if __name__ == "__main__":
    with browse(Path(sys.argv[1])) as (tab, address):
        OverheadPage(tab).open(f"{address}/overhead.html")
        tab.screenshot(path=sys.argv[2])
