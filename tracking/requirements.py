"""asv plugin: whatever pip fetches for an environment has to be in requirements.lock, by hash.

asv installs its own tools and an axis of the results before the project's commands have a say, so
pip is told in the environment. `make lock` writes the file.
"""

import os

from tracking.repository import ROOT

LOCK = ROOT / "requirements.lock"
UNLOCKED = "ASV_UNLOCKED"  # in the environment: what is fetched is in no lock


def setup():
    """Bind pip in all that asv starts, when asv loads this plugin."""
    if not os.environ.get(UNLOCKED):
        os.environ |= {
            "PIP_CONSTRAINT": LOCK.as_uri(),  # pip cuts a path at its spaces
            "PIP_ONLY_BINARY": ":all:",  # to build a package is to fetch more
            "PIP_REQUIRE_HASHES": "1",
        }
