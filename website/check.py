"""Open the published site in a headless Chromium that reaches nothing but it, and look.

Needs a Chromium (Debian: `apt-get install chromium`) and the dependency group `browser`.
"""

import argparse
import functools
import shutil
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlencode

from playwright.sync_api import sync_playwright

from website.history import ROOT
from website.report import HEADLINE

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


def look(html_dir, machine=None, screenshot=None, over_context=False):
    """Open the graph of the headline benchmark and return its series as {label: points}.

    Its x axis is the commits, or with `over_context` the context length at the last commit.
    Raises RuntimeError if the page asks for anything that is not in `html_dir`, reports a script
    error, or draws nothing.
    """
    browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser_path is None:
        raise RuntimeError(f"expected a browser, found none of {', '.join(BROWSERS)}")
    server, address = serve(html_dir)
    state = [("machine", machine)] if machine else []
    state += [("p-block_size", 32)]
    if over_context:
        state += [("x-axis", "context")]
    else:
        state += [("p-context", 1024), ("p-context", 4096)]
    problems = []

    def only_here(route):
        if route.request.url.startswith((address, "data:")):
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
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            page.route("**/*", only_here)
            page.on("response", lambda r: r.ok or problems.append(f"got {r.status} for {r.url}"))
            page.on("pageerror", lambda error: problems.append(f"script error: {error}"))
            page.goto(f"{address}/index.html#{HEADLINE}?{urlencode(state)}")
            try:
                page.wait_for_function(f"() => ({SERIES})()?.some(s => s[1].length)", timeout=20000)
            except Exception as error:
                problems.append(f"no series was drawn ({error})")
            series = page.evaluate(SERIES) or []
            if series and page.evaluate(INK) < 3:
                problems.append("the graph's canvas is blank")
            if screenshot:
                page.screenshot(path=screenshot)
            browser.close()
    finally:
        server.shutdown()
    if problems:
        raise RuntimeError(f"{html_dir}: " + "; ".join(problems))
    return dict(series)


def main():
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m website.check", description=__doc__)
    parser.add_argument("html_dir", nargs="?", default=ROOT / ".asv/html", type=Path)
    parser.add_argument("--machine", help="of which machine (default: asv's choice)")
    parser.add_argument("--over-context", action="store_true", help="context length on the x axis")
    parser.add_argument("--screenshot", help="write a PNG here")
    args = parser.parse_args()
    try:
        series = look(args.html_dir, args.machine, args.screenshot, args.over_context)
    except RuntimeError as error:
        sys.exit(str(error))
    points = sum(len(points) for points in series.values())
    drawn = f"{len(series)} series, {points} points"
    print(f"{args.html_dir}: {HEADLINE} drawn without network, {drawn}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
