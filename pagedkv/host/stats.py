"""A scheduler's numbers, and the format in which Prometheus reads them. Host only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stats:
    """Counters and current state of a scheduler.

    Attributes
    ----------
    blocks_allocated, blocks_live, blocks_cached, blocks_free : int
        All blocks; those that sequences hold; those that only the prefix cache holds; the rest.
    block_bytes : int
        Bytes of a block in the layers of its group; 0 if the scheduler was not given it.
    waiting, running : int
        Requests.
    prompt_tokens, hit_tokens : int
        Tokens of admitted sequences since the start, and how many of them were cached.
    preemptions, evicted_blocks : int
        Since the start.
    group_blocks : tuple of int
        Blocks in use in each group of layers.
    """

    blocks_allocated: int
    blocks_live: int
    blocks_cached: int
    blocks_free: int
    block_bytes: int
    waiting: int
    running: int
    prompt_tokens: int
    hit_tokens: int
    preemptions: int
    evicted_blocks: int
    group_blocks: tuple[int, ...] = ()

    @property
    def hit_rate(self) -> float:
        """Share of admitted tokens that were cached, 0 to 1."""
        return self.hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


def render_prometheus(stats: Stats, prefix: str = "pagedkv") -> str:
    """Return a scheduler's numbers in Prometheus' text format.

    Parameters
    ----------
    stats : Stats
        The result of `Scheduler.stats`.
    prefix : str
        Prefix of the names.

    Returns
    -------
    str
        Gauges and counters, each with its help and type.
    """
    blocks = {
        "allocated": stats.blocks_allocated,
        "live": stats.blocks_live,
        "cached": stats.blocks_cached,
        "free": stats.blocks_free,
    }
    size = {state: count * stats.block_bytes for state, count in blocks.items()}
    requests = {"waiting": stats.waiting, "running": stats.running}
    lines: list[str] = []

    def metric(
        name: str, kind: str, description: str, values: dict[str, int], label: str = "state"
    ) -> None:
        lines.append(f"# HELP {prefix}_{name} {description}")
        lines.append(f"# TYPE {prefix}_{name} {kind}")
        for key, value in values.items():
            labels = f'{{{label}="{key}"}}' if key else ""
            lines.append(f"{prefix}_{name}{labels} {value}")

    metric("blocks", "gauge", "Blocks of the pool by state.", blocks)
    metric("block_bytes", "gauge", "Bytes of the pool's blocks by state.", size)
    if len(stats.group_blocks) > 1:
        groups = {str(group): count for group, count in enumerate(stats.group_blocks)}
        metric("group_blocks", "gauge", "Blocks by group of layers.", groups, "group")
    metric("requests", "gauge", "Requests by state.", requests)
    for name, value, description in (
        ("prompt_tokens", stats.prompt_tokens, "Tokens of admitted sequences."),
        ("hit_tokens", stats.hit_tokens, "Tokens of admitted sequences that were cached."),
        ("preemptions", stats.preemptions, "Sequences that gave up their blocks."),
        ("evicted_blocks", stats.evicted_blocks, "Blocks evicted from the prefix cache."),
    ):
        metric(f"{name}_total", "counter", description, {"": value})
    return "\n".join(lines) + "\n"
