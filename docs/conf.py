"""The documentation as a site: `make docs`.

Its root is the repository's, so that links between README.md, CONTRIBUTING.md and docs/ hold in
both. It needs no network, neither to be built nor to be read.
"""

import importlib.util

project = "pagedkv"
root_doc = "README"
include_patterns = ["*.md", "docs/**.md"]
exclude_patterns = [".*", "results", "website"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
if not importlib.util.find_spec("mlx_lm"):  # Python 3.10 has none: a site without its reference
    exclude_patterns.append("docs/api-mlx-lm.md")
    suppress_warnings = ["myst.xref_missing", "toc.excluded", "toc.not_readable"]

html_theme = "furo"
html_title = "pagedkv"
html_copy_source = False
html_show_copyright = False
html_theme_options = {"top_of_page_buttons": []}

autodoc_member_order = "bysource"
autodoc_default_options = {
    "members": True,
    "inherited-members": "object, BaseException, Enum, list, str, tuple",
}
autodoc_preserve_defaults = True
autodoc_type_aliases = {"ArrayLike": "ArrayLike"}
default_role = "literal"  # of `names` in docstrings

# Classes that calls return: how they are made is of no use.
RETURNED = "CacheEvent DecodeBatch DecodePath Explanation Extension Layout MemoryUsage PromptCache \
    Schedule ScheduledStep SlotMapping Stats Step StoreStats"

# Beside the pages; README.md says the same in words.
CONTENTS = {
    "Use it": ["package", "api", "api-mlx-lm", "serving", "several-machines"],
    "Watch it": ["performance", "measuring", "runner"],
    "Work on it": ["where-things-are", "adr/README", "/CONTRIBUTING", "/CHANGELOG"],
}


# What `make publish` puts beside this site.
RESULTS = '<p><a href="../overhead.html">The newest results</a></p>'


def add_contents(app, name, text):
    """Add to the first page what is no use on GitHub: the way to the results, and the contents."""
    if name == root_doc:
        text[0] = text[0].replace("## Watch it\n", f"## Watch it\n\n{RESULTS}\n")
        for caption, pages in CONTENTS.items():
            entries = "\n".join(page if page[0] == "/" else f"/docs/{page}" for page in pages)
            text[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```\n"
    elif name == "docs/adr/README":
        text[0] += "\n```{toctree}\n:hidden:\n:glob:\n\n0*\n```\n"


def hide_signature(app, what, name, thing, options, signature, returned):
    """Leave out the arguments of classes in `RETURNED`."""
    hidden = what == "class" and name.split(".")[-1] in RETURNED.split()
    return ("", None) if hidden else None


def setup(app):
    """Register what this file adds to Sphinx."""
    app.connect("autodoc-process-signature", hide_signature)
    app.connect("source-read", add_contents)
