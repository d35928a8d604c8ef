"""A cache whose layers are in groups, against a NumPy array of what was written by each table."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tables_machine import TablesMachine
from test_kv_cache import Fault

from pagedkv import OutOfBlocksError, PagedKVCache, RadixTree

SIZE = 3  # tokens in a block


class GroupsMachine(TablesMachine):
    """Tables and a tree of cached prefixes that come and go.

    What a coming token sees is there in every layer, and what none sees is given back.
    """

    MOST, windows = 5, ()

    def __init__(self):
        super().__init__()
        self.paged = PagedKVCache(
            num_layers=len(self.windows),
            num_blocks=7,
            block_size=SIZE,
            kv_heads=1,
            head_dim=2,
            dtype=mx.float32,
            windows=self.windows,
        )
        self.pool = self.paged.pool
        self.tree = RadixTree(self.pool, SIZE)
        self.tables, self.models = [self.paged.new_table()], [[]]

    @rule(data=st.data(), fail=st.booleans())
    def extend(self, data, fail):
        """Tokens are of a small alphabet, so that sequences have much in common."""
        chosen = self.draw(data, many=True)
        token = st.integers(0, 1)
        parts = [data.draw(st.lists(token, min_size=1, max_size=7)) for _ in chosen]
        tables = [self.tables[which] for which in chosen]
        before = self.pool.num_free
        try:
            with self.paged.extend(tables, [len(part) for part in parts]) as step:
                for layer in range(len(self.windows)):
                    # K of a token is what it and all before it are.
                    rows = [
                        content([*self.models[which], *part], layer)[-len(part) :]
                        for which, part in zip(chosen, parts, strict=True)
                    ]
                    keys = mx.array(np.concatenate(rows))[None, None]
                    self.paged.write(layer, keys, -keys, step.slots_of(layer))
                if fail:
                    raise Fault
        except OutOfBlocksError:
            assert self.pool.num_free >= before  # some may have been reclaimed
            return
        except Fault:
            return
        for which, part in zip(chosen, parts, strict=True):
            self.models[which] = [*self.models[which], *part]

    @rule(data=st.data())
    def truncate(self, data):
        which = self.draw(data)
        kept = data.draw(st.integers(0, len(self.models[which])))
        before = self.pool.ids.copy()
        try:
            self.tables[which].truncate(kept)
        except ValueError:
            assert kept < len(self.models[which])
            assert np.array_equal(before, self.pool.ids)
            return
        self.models[which] = self.models[which][:kept]

    @rule(data=st.data())
    def cache(self, data):
        """Cache a sequence's whole blocks, and hold those of the tree instead of one's own."""
        which = self.draw(data)
        table, tokens = self.tables[which], np.array(self.models[which], np.int32)
        if len(tokens) >= SIZE:
            self.pool.share(table.row, 0, self.tree.insert(tokens, table.blocks).ids)

    @precondition(lambda self: len(self.tables) < self.MOST)
    @rule(tokens=st.lists(st.integers(0, 1), max_size=20))
    def begin(self, tokens):
        """A prompt begins with as much as is cached of it, and with what it sees of that."""
        match = self.tree.match_prefix(np.array(tokens, np.int32))
        table = self.paged.new_table()
        table.adopt(match.ids, match.num_blocks * SIZE)
        self.tables.append(table)
        self.models.append(tokens[: match.num_blocks * SIZE])

    @rule(count=st.integers(1, 4))
    def evict(self, count):
        before, evictable = self.pool.num_free, self.tree.num_evictable
        freed = self.tree.evict(count)
        assert freed == self.pool.num_free - before
        assert freed >= min(count, evictable)

    @invariant()
    def agrees(self):
        self.pool.check_invariants()
        self.tree.check_invariants()
        for layer, window in enumerate(self.windows):
            group = self.paged.group_of(layer)
            keys, values = (
                np.array(pools[layer]).reshape(-1, 2)
                for pools in (self.paged.keys, self.paged.values)
            )
            for table, model in zip(self.tables, self.models, strict=True):
                assert table.num_tokens == len(model)
                first = 0 if window is None else max(0, len(model) + 1 - window)
                blocks = table.blocks[group].tolist()
                slots = [blocks[t // SIZE] * SIZE + t % SIZE for t in range(first, len(model))]
                assert all(slot >= 0 for slot in slots)
                expected = content(model, layer)[first:]
                assert np.array_equal(keys[slots], expected)
                assert np.array_equal(values[slots], -expected)

    @rule()
    def keep_no_more_than_is_seen(self):
        self.pool.drop_windows()
        for group, window in enumerate(self.paged.groups.windows):
            for table in self.tables if window else ():
                assert (table.blocks[group] >= 0).sum() <= -(-window // SIZE) + 1


def content(tokens, layer):
    """K of tokens in a layer, shape [L, 2]: a number for each prefix."""
    numbers, number = [], layer + 1
    for token in tokens:
        number = (2 * number + token + 1) % 65_521
        numbers.append((number, number + 0.5))
    return np.array(numbers, np.float32).reshape(-1, 2)


@pytest.mark.parametrize("windows", [(None, 5), (4, 4, None, 9), (2, None, 2, 2, 2, None)], ids=str)
def test_groups(windows, storage):
    machine = type("Machine", (GroupsMachine,), {"windows": windows})
    checks = settings(
        max_examples=25, stateful_step_count=40, deadline=None, phases=[Phase.generate]
    )
    run_state_machine_as_test(machine, settings=checks)
