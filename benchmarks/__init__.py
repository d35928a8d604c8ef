"""The asv suite. Runs against every commit of the package; CONTRIBUTING.md has the rules."""

from asv_runner.benchmarks import benchmark_types

from .ratio import RatioBenchmark
from .track import TrackBenchmark

# asv takes the first type whose name_regex matches.
benchmark_types[:0] = [RatioBenchmark, TrackBenchmark]
