"""The cache against a NumPy array of what was written through each table."""

import mlx.core as mx
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    invariant,
    rule,
    run_state_machine_as_test,
)
from tables_machine import TablesMachine
from test_kv_cache import Fault, stored

from pagedkv import DecodeBatch, OutOfBlocksError, PagedKVCache, blocks_needed


class CacheMachine(TablesMachine):
    """Every table against a NumPy array of what was written through it.

    Steps go on with the same tables, or not, and tables change in between in all ways.
    """

    def __init__(self):
        super().__init__()
        self.paged = PagedKVCache(
            num_layers=1, num_blocks=9, block_size=3, kv_heads=1, head_dim=2, dtype=mx.float32
        )
        self.tables, self.models = [self.paged.new_table()], [np.zeros((0, 2), np.float32)]
        self.next = 1.0
        self.last = []  # tables of the last step

    def new(self, count):
        values = np.arange(2 * count, dtype=np.float32).reshape(count, 2) + self.next
        self.next += 2 * count
        return values

    def blocks_for(self, chosen, counts):
        """Blocks that an extension takes, counted the slow way."""
        needed = 0
        for which, count in zip(chosen, counts, strict=True):
            length, ids = len(self.models[which]), self.tables[which].block_ids.tolist()
            needed += blocks_needed(length + count, 3) - len(ids)
            if count and length % 3:
                needed += sum(ids[-1] in table.block_ids for table in self.tables) > 1
        return needed

    @rule(data=st.data(), fail=st.booleans())
    def extend(self, data, fail):
        chosen = self.draw(data, many=True)
        counts = data.draw(
            st.lists(st.integers(0, 5), min_size=len(chosen), max_size=len(chosen)).filter(any)
        )
        self.step(chosen, counts, self.new(sum(counts)), fail)

    @rule(count=st.integers(1, 2), times=st.integers(1, 7), fail=st.booleans())
    def go_on(self, count, times, fail):
        """More steps of the same sequences, as far as they are still there; the last may fail."""
        for number in range(times):
            chosen = [self.tables.index(table) for table in self.last if table in self.tables]
            if chosen:
                counts = [count] * len(chosen)
                self.step(chosen, counts, self.new(sum(counts)), fail and number == times - 1)

    def step(self, chosen, counts, new, fail=False):
        tables = self.last = [self.tables[which] for which in chosen]
        empty = any(
            len(self.models[which]) + count == 0
            for which, count in zip(chosen, counts, strict=True)
        )
        keys = mx.array(new)[None, None]
        free, needed = self.paged.pool.num_free, self.blocks_for(chosen, counts)
        try:
            with self.paged.extend(tables, counts) as step:
                self.paged.write(0, keys, -keys, step.slots)
                held = {block for table in self.tables for block in table.block_ids.tolist()}
                assert self.paged.pool.num_free == 9 - len(held) >= free - needed
                self.check(step, tables, counts)
                if fail:
                    raise Fault
        except OutOfBlocksError:
            assert needed > free
            return
        except ValueError:
            assert empty
            return
        except Fault:
            return
        assert not empty
        for which, part in zip(chosen, np.split(new, np.cumsum(counts)[:-1]), strict=True):
            self.models[which] = np.concatenate([self.models[which], part])

    def check(self, step, tables, counts):
        """What a step attends over is what its tables say."""
        batch = DecodeBatch.from_tables(
            [table.block_ids for table in tables],
            [table.num_tokens for table in tables],
            block_size=3,
            num_blocks=9,
        )
        held = np.array(step.batch.block_tables)  # with room for more
        for row, own, table in zip(held, np.array(batch.block_tables), tables, strict=True):
            count = len(table.block_ids)
            assert row[:count].tolist() == own[:count].tolist()
        assert step.batch.lens.tolist() == batch.lens.tolist()
        assert step.batch.context_lens.tolist() == batch.context_lens.tolist()
        ends = zip(tables, counts, strict=True)
        slots = [table.slots(table.num_tokens - count) for table, count in ends]
        assert step.slots.slots.tolist() == np.concatenate(slots).tolist()

    @rule(data=st.data())
    def compute_again(self, data):
        """Another sequence of the same tokens, in blocks of its own."""
        which = self.draw(data)
        if len(self.tables) < self.MOST and len(self.models[which]):
            self.start()
            self.step([len(self.tables) - 1], [len(self.models[which])], self.models[which])

    @rule(data=st.data())
    def share(self, data):
        """Hold a full block of another sequence that begins with the same tokens."""
        which, other = self.draw(data), self.draw(data)
        whole = min(len(self.models[which]), len(self.models[other])) // 3
        equal = self.models[which][: whole * 3] == self.models[other][: whole * 3]
        whole = int(np.cumprod(equal.all(axis=1)).sum()) // 3
        if whole:
            block = data.draw(st.integers(0, whole - 1))
            theirs = self.tables[other].blocks[:, block : block + 1]
            self.paged.pool.share(self.tables[which].row, block, theirs)

    @rule()
    def start(self):
        if len(self.tables) < self.MOST:
            self.tables.append(self.paged.new_table())
            self.models.append(np.zeros((0, 2), np.float32))

    @rule(data=st.data())
    def truncate(self, data):
        which = self.draw(data)
        kept = data.draw(st.integers(0, len(self.models[which])))
        self.tables[which].truncate(kept)
        self.models[which] = self.models[which][:kept]

    @invariant()
    def agrees(self):
        pool = self.paged.pool
        pool.check_invariants()
        held = np.zeros(9, int)
        for table, model in zip(self.tables, self.models, strict=True):
            assert table.num_tokens == len(model)
            np.add.at(held, table.block_ids, 1)
            keys, values = stored(self.paged, table, layer=0)
            assert np.array_equal(keys[:, 0], model)
            assert np.array_equal(values[:, 0], -model)
        assert held.tolist() == [pool.reference_count(block) for block in range(9)]


def test_cache(storage):
    checks = settings(max_examples=50, stateful_step_count=50, deadline=None)
    run_state_machine_as_test(CacheMachine, settings=checks)
