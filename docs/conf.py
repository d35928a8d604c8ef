"""The documentation as a site: `make docs`.

Its root is the repository's, so that links between README.md, CONTRIBUTING.md and docs/ hold in
both. It needs no network, neither to be built nor to be read.
"""

import re

project = "pagedkv"
root_doc = "README"
include_patterns = ["*.md", "docs/**.md"]
exclude_patterns = [".*", "results", "website"]
extensions = ["myst_parser"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "pagedkv"
html_copy_source = False
html_show_copyright = False
html_theme_options = {"top_of_page_buttons": []}

# Beside the pages; README.md says the same in words.
CONTENTS = {
    "Use it": ["with-mlx-lm", "serving", "several-machines", "package", "api"],
    "Watch it": ["performance", "measuring", "runner"],
    "Work on it": ["where-things-are", "adr/README", "/CONTRIBUTING", "/CHANGELOG"],
}


# The state of the tests, from GitHub.
BADGE = re.compile(r"^# pagedkv .*\n")

# What `make publish` puts beside this site.
RESULTS = '<p><a href="../overhead.html">The newest results</a></p>'


def add_contents(app, name, text):
    """Add to the first page what is no use on GitHub: the way to the results, and the contents."""
    if name == root_doc:
        text[0] = BADGE.sub("# pagedkv\n", text[0])
        text[0] = text[0].replace("## Watch it\n", f"## Watch it\n\n{RESULTS}\n")
        for caption, pages in CONTENTS.items():
            entries = "\n".join(page if page[0] == "/" else f"/docs/{page}" for page in pages)
            text[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```\n"
    elif name == "docs/adr/README":
        text[0] += "\n```{toctree}\n:hidden:\n:glob:\n\n0*\n```\n"


def setup(app):
    """Register what this file adds to Sphinx."""
    app.connect("source-read", add_contents)
