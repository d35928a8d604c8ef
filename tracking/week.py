"""A simulated week of nights on this machine, published as the site is: `make week`.

Seven nights are of identical commits; then comes one whose `decode_attention` takes 10% longer, and
in another history three that take 5% longer. Each is measured as a night measures, and after each
the site's regressions are published from what there is. Only attention alone at 1024 tokens is
measured, a cell for each batch. Nothing is measured again, as a real night does with what looks
worse: that is a safeguard of its own.
"""

import shutil
import time

from asv.util import UserError, load_json

from tracking.changes import changes
from tracking.detection import DETECTION, slowed
from tracking.grid import selection
from tracking.noise import NIGHT, recorded_noise
from tracking.project import (
    asv,
    asv_settings,
    backend_settings,
    derive_config,
    discover,
    environment_name,
)
from tracking.repository import ROOT, commit_of, git
from tracking.results import RESULTS
from tracking.tables import write_csv

NIGHTS = 7  # of identical code
AFTER = ((10, 1), (5, 3))  # percent slower, nights
HEADER = ["night", "slower by", "cells published", "comparisons", "called slower", "called faster"]
REF = "refs/simulated/week"
FOLDER = ROOT / ".asv/week"
PAGES = (".website.publish", ".website.offline")  # are not looked at


class _Week:
    """Measures and publishes nights in a folder of their own."""

    def __init__(self, machine, backend):
        self.machine = machine
        shutil.rmtree(FOLDER, ignore_errors=True)
        results = FOLDER / "results"
        (results / machine).mkdir(parents=True)
        shutil.copy(RESULTS / machine / "noise.csv", results / machine)
        self.settings = {
            **backend_settings(backend),
            "results_dir": str(results),
            "html_dir": str(FOLDER / "html"),
            "plugins": [name for name in asv_settings()["plugins"] if name not in PAGES],
        }
        self.results = results
        self.config = derive_config("week", **self.settings)
        self.environment = environment_name(self.config)
        self.listed = discover(machine, self.config)

    def measure(self, commit):
        """Measure a commit as a night does."""
        options = ["--machine", self.machine, "--attribute", f"rounds={NIGHT}", "--show-stderr"]
        benchmark = self.listed[DETECTION]
        batches, _, sizes = benchmark["params"]
        options += selection({**benchmark, "params": [batches, ["1024"], sizes]}, "short")
        if asv("run", *options, f"{commit}^!", config=self.config):
            raise UserError("a benchmark failed, see above")

    def published(self, tip):
        """Return the names of the cells that are published as regressions of a history."""
        git("update-ref", REF, tip)  # asv numbers the commits that some ref leads to
        config = derive_config("week", **self.settings, branches=[tip])
        if asv("publish", "--no-pull", config=config):
            raise UserError("asv could not publish, see above")
        found = load_json(str(FOLDER / "html/regressions.json"))["regressions"]
        return [name for name, *_ in found]

    def called(self, pairs):
        """Return (comparisons, called slower, called faster) of pairs of measured commits."""
        noise = recorded_noise(self.machine, self.results)
        where = self.environment, self.listed
        verdicts = [
            change.verdict(noise)
            for before, after in pairs
            for change in changes(self.results, self.machine, before, after, *where)
        ]
        return len(verdicts), verdicts.count("worsened"), verdicts.count("improved")


def week(*, machine, backend):
    """Simulate the week and record what was published, and what comparing the nights says."""
    if not recorded_noise(machine).threshold(DETECTION).recorded:
        raise UserError(f"the noise of machine {machine} is not recorded: run `make noise`")
    began, simulated, rows = time.monotonic(), _Week(machine, backend), []

    def night(tree_of, parent, nights, percent, before):
        commit = commit_of(f"{tree_of}^{{tree}}", f"Night {nights}, slower by {percent}%", parent)
        simulated.measure(commit)
        cells = len(simulated.published(commit))
        pairs = [(other, commit) for other in before]
        rows.append([str(nights), f"{percent}%", cells, *simulated.called(pairs)])
        write_csv(RESULTS / machine / "week.csv", HEADER, rows)
        return commit

    try:
        same, identical = slowed(0), []
        for number in range(1, NIGHTS + 1):
            parent = identical[-1] if identical else "HEAD"
            identical.append(night(same, parent, number, 0, identical))
        for percent, nights in AFTER:
            slower, tip = slowed(percent), identical[-1]
            for number in range(NIGHTS + 1, NIGHTS + 1 + nights):
                tip = night(slower, tip, number, percent, identical)
    finally:
        git("update-ref", "-d", REF)
        (ROOT / simulated.config).unlink()
    print(f"took {(time.monotonic() - began) / 60:.0f} minutes")
    return 0
