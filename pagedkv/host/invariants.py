"""Checks that a scheduler and its parts agree about blocks; for tests. Host only."""

from __future__ import annotations

from collections import Counter

from pagedkv.host.admission import Admission
from pagedkv.host.block_pool import BlockPool
from pagedkv.host.in_flight import InFlight
from pagedkv.host.prefixes import Prefixes


def check_blocks(
    pool: BlockPool, prefixes: Prefixes, admission: Admission, in_flight: list[InFlight]
) -> None:
    """Raise AssertionError unless each block has as many holders as are known; linear time."""
    tree = prefixes.tree
    ended = dict.fromkeys(sequence for flight in in_flight for sequence in flight.ended)
    holders = [*admission.running, *ended]
    pool.check_invariants()
    admission.check_invariants()
    prefixes.check_invariants(holders)
    # What was cached before a reset is held until its last sequence ends.
    forgotten = {block for s in holders if s.node for block in s.node.up_to()}
    held = Counter({*tree.blocks(), *forgotten})
    held.update(replaced := [block for flight in in_flight for block in flight.replaced])
    live = {*replaced}
    for sequence in holders:
        ids = sequence.table.block_ids.tolist()
        held.update(ids)
        live.update(ids)
        assert in_flight or sequence.missing > 0, "a sequence has nothing to compute"
    for block in range(pool.num_blocks):
        assert pool.reference_count(block) == held[block], f"block {block} is miscounted"
    assert len(+held) - tree.num_evictable <= len(live), "locked by nobody"
