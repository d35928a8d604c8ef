"""Prometheus metrics: what the server answered, and what its store holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from pagedkv.errors import PagedKVError

FIRST = 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0
BETWEEN = 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0


class Metrics:
    """Counters, gauges and histograms of a server. Any thread may count.

    Parameters
    ----------
    store : callable
        Returns the `PagedStore`, or None while there is none.
    """

    def __init__(self, store: Callable[[], Any]) -> None:
        self._store = store
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "pagedkv_requests", "Requests by how they ended.", ["end"], registry=registry
        )
        self._running = Gauge("pagedkv_requests_running", "Requests begun.", registry=registry)
        self._tokens = Counter("pagedkv_tokens", "Tokens.", ["kind"], registry=registry)
        self._first = Histogram(
            "pagedkv_time_to_first_token_seconds",
            "From a request to its first token.",
            buckets=FIRST,
            registry=registry,
        )
        self._between = Histogram(
            "pagedkv_time_between_tokens_seconds",
            "From a token to the next.",
            buckets=BETWEEN,
            registry=registry,
        )
        self._blocks = Gauge("pagedkv_blocks", "Blocks by state.", ["state"], registry=registry)

    def observed(self, context: Any, responses: Iterator[Any], began: float) -> Iterator[Any]:
        """Yield responses, and count them.

        Parameters
        ----------
        context : GenerationContext
            Of the request.
        responses : iterator
            A `Response` for each token.
        began : float
            When the request came, of `time.monotonic`.
        """
        last, end = None, "left"
        self._running.inc()
        try:
            for response in responses:
                now = time.monotonic()
                if last is None:
                    self._first.observe(now - began)
                    cached = max(context.prompt_cache_count, 0)
                    self._tokens.labels("cached").inc(cached)
                    self._tokens.labels("prompt").inc(len(context.prompt))
                else:
                    self._between.observe(now - last)
                last = now
                self._tokens.labels("answer").inc()
                yield response
            end = "answered"
        except (GeneratorExit, ConnectionError):
            raise
        except BaseException:
            end = "failed"
            raise
        finally:
            self._running.dec()
            self._requests.labels(end).inc()

    def refused(self) -> None:
        """Count a request that was refused."""
        self._requests.labels("refused").inc()

    def render(self) -> tuple[bytes, str]:
        """Return all in Prometheus' text format, and its content type."""
        store = self._store()
        if store is not None:
            with suppress(PagedKVError):  # it was closed
                stats = store.stats()
                self._blocks.labels("free").set(stats.free_blocks)
                self._blocks.labels("cached").set(stats.cached_blocks)
                self._blocks.labels("all").set(stats.num_blocks)
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
