"""The asv suite. Runs against every commit of the package; CONTRIBUTING.md has the rules."""

from asv_runner.benchmarks import benchmark_types

from .kinds import TimeBenchmark, TrackBenchmark
from .ratio import RatioBenchmark

# asv takes the first type whose name_regex matches.
benchmark_types[:0] = [RatioBenchmark, TimeBenchmark, TrackBenchmark]
