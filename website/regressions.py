"""What a machine's recorded noise lets one call a regression.

asv fits steps to any series, with one threshold, and takes a rise of anything for worse. Here a
series steps where its own threshold says so (`tracking.levels`), and not without recorded noise; a
benchmark whose larger values are better regresses when it falls; and what was accepted is marked.
"""

import math

from asv.console import log
from asv.step_detect import detect_regressions

from tracking import triage
from tracking.grid import cells, series_name
from tracking.levels import levels
from tracking.repository import commit_labels, subjects
from website.series import noise_of

LEAST = 1e-100  # what stands for nothing, whose reciprocal would be infinite


def jumps(points, threshold, *, larger):
    """Return where a series became worse and stayed so: [(revision before, after, factor)].

    `points` are (revision, value), None or NaN where there is no number.
    """
    points = [(at, max(x, LEAST)) for at, x in points if x is not None and not math.isnan(x)]
    if not points or not threshold.recorded:
        return []
    values = [1 / value if larger else value for _, value in points]
    steps = [
        (points[first][0], points[end - 1][0] + 1, level, level, 0.0)
        for first, end, level in levels(values, threshold)
    ]
    # Neighbours differ by half a threshold at least; so must the last level and the best.
    found = detect_regressions(steps, math.sqrt(threshold.factor) - 1)[2]
    return [(before, after, now / was) for before, after, was, now in found or ()]


def regressions(graphs, benchmarks, revisions, results):
    """Return the regressions of asv's graphs, a dictionary for each cell and commit."""
    hashes, noise = {revision: commit for commit, revision in revisions.items()}, {}
    entries, used, found = triage.read(), set(), []
    for _, graph in graphs:
        benchmark, machine = benchmarks.get(graph.benchmark_name), graph.params.get("machine")
        if not benchmark or not machine:
            continue  # a summary of several
        if machine not in noise:
            noise[machine] = noise_of(machine, results)
        for i, cell in enumerate(cells(benchmark)[: graph.n_series]):
            name = series_name(benchmark["name"], cell)
            data = [(at, v if graph.scalar_series else v[i]) for at, v, _ in graph.get_data()]
            larger = benchmark.get("better") == "larger"
            for *at, factor in jumps(data, noise[machine].threshold(name), larger=larger):
                before, after = (hashes[revision] for revision in at)
                commits = triage.between(before, after)
                entry = triage.acceptance(entries, name, machine, commits)
                used.add(entry)
                one = {"name": name, "machine": machine, "factor": factor, "from": before}
                why = entry and {"reason": entry.reason, "link": entry.link}
                found.append(one | {"to": after, "accepted": why})
    for sentence in triage.stale(entries, used):
        log.warning(sentence)
    commits = {one["to"] for one in found}
    labels, titles = commit_labels(commits), subjects(commits)
    return [
        one | {"commit": labels[one["to"]], "subject": titles[one["to"]]}
        for one in sorted(found, key=lambda one: -one["factor"])
    ]
