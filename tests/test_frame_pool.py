import numpy as np
import pytest
from interrupts import interrupted

from pagedkv import OutOfBlocksError, RadixTree
from pagedkv.host.block_table import BlockTable
from pagedkv.host.frame_pool import FramePool
from pagedkv.host.rows import Rows

SIZE = 4


def pool_of(num_frames=12, windows=(None, 6), **options):
    return FramePool(num_frames, windows, SIZE, **options)


def grown(pool, count, table=None):
    """A table with so many more tokens, one step."""
    table = table or BlockTable(pool, SIZE)
    Rows([table]).reserve([count]).commit()
    return table


def test_a_block_has_a_frame_in_every_group():
    pool = pool_of(num_frames=7)
    assert (pool.num_blocks, pool.num_frames, pool.num_free) == (7, 7, 3)
    table = grown(pool, 8)
    assert table.ids.tolist() == [0, 1]
    assert pool.frames[:3].tolist() == [[0, 1], [2, 3], [-1, -1]]
    assert (pool.num_free, pool.num_free_frames) == (1, 3)
    with pytest.raises(OutOfBlocksError, match="expected 2 free blocks, 1 are left"):
        pool.allocate(2)
    table.truncate(4)
    assert pool.num_free_frames == 5
    pool.check_invariants()


def test_what_leaves_the_window_is_given_back():
    pool = pool_of(num_frames=100)
    table, kept = BlockTable(pool, SIZE), []
    for _ in range(40):
        grown(pool, 1, table)
        kept.append((pool.frames[np.array(table.ids)] >= 0).sum(axis=0).tolist())
        pool.check_invariants()
    assert [full for full, _ in kept] == [-(-n // 4) for n in range(1, 41)]
    # The next token sees 5 before it.
    assert [window for _, window in kept] == [1] * 4 + [2] * 36


def test_a_margin_is_kept_for_tokens_that_are_taken_back():
    for margin, taken in ((0, 3), (8, 11)):
        pool = pool_of(num_frames=100, margin=margin)
        table = grown(pool, 40)
        for count in range(1, 20):
            fork = table.fork()
            if count <= taken:
                fork.truncate(40 - count)
                continue
            before = fork.state
            with pytest.raises(ValueError, match=f"seen after {40 - count} tokens"):
                fork.truncate(40 - count)
            assert fork.state == before
            break
        else:
            pytest.fail("all can be taken back")
        table.truncate(0)


def test_frames_of_forks_come_back_when_they_are_needed():
    pool = pool_of(num_frames=16)
    first = grown(pool, 8)
    second = first.fork()
    for table in (first, second):
        grown(pool, 12, table)
    # 2 shared blocks and 3 of each; of the shared ones nobody sees the frames with a window.
    assert pool.group_frames() == (8, 6)
    assert pool.idle().sum() == 2
    assert pool.num_free == 1
    grown(pool, 8, first)
    assert pool.idle().sum() == 0
    pool.check_invariants()


def test_the_least_recently_used_is_reclaimed_first():
    pool = pool_of(num_frames=16)
    tree = RadixTree(pool, SIZE)
    tables = [grown(pool, 12), grown(pool, 12)]
    for number, table in enumerate(tables):
        tree.insert([number] * 12, table.ids)
    old, new = (np.array(table.ids) for table in tables)
    for table in tables:
        table.truncate(0)
    blocks, _ = tree.match_prefix([0] * 12)
    assert blocks == old.tolist()
    again = BlockTable(pool, SIZE)
    again.adopt(blocks, 12)  # now it is the other one
    again.truncate(0)
    assert pool.num_free_frames == 4
    # What has left a window, and nobody has asked for, comes first.
    assert pool.reclaim(9, asked_for=False) == 1
    assert (pool.frames[[*old, *new], 1] >= 0).tolist() == [False, True, True] * 2
    assert len(tree.match_prefix([1] * 12)[0]) == len(tree.match_prefix([0] * 12)[0]) == 3
    assert pool.reclaim(1, asked_for=True) == 1
    assert (pool.frames[new, 1] < 0).all()
    assert tree.match_prefix([1] * 12)[0] == []
    assert tree.match_prefix([0] * 12)[0] == old.tolist()
    pool.check_invariants()


def test_a_hit_is_shorter_when_its_window_is_gone():
    pool = pool_of(num_frames=40)
    tree = RadixTree(pool, SIZE)
    table = grown(pool, 24)
    tree.insert(list(range(24)), table.ids)
    frames = pool.frames[np.array(table.ids), 1]
    assert (frames >= 0).all()  # remembered, for there is a tree
    pool._give_back(np.array(table.ids)[3:4], np.array([False, True]))
    # After 24 and after 8 or 12 tokens nobody sees the fourth block, after 16 and 20 somebody does.
    assert len(tree.match_prefix(list(range(24)))[0]) == 6
    assert len(tree.match_prefix(list(range(23)))[0]) == 3
    assert pool.reusable(table.ids[:5]) == 3
    with pytest.raises(ValueError, match="seen after 20 tokens"):
        BlockTable(pool, SIZE).adopt(table.ids[:5], 20)
    assert pool.reference_count(table.ids[0]) == 2


def test_a_cached_block_takes_over_what_it_has_lost():
    pool = pool_of(num_frames=40)
    tree = RadixTree(pool, SIZE)
    first, second = grown(pool, 12), grown(pool, 12)
    tree.insert([7] * 12, first.ids)
    first.truncate(0)
    pool.reclaim(100, asked_for=True)
    assert tree.match_prefix([7] * 12)[0] == []
    cached, _ = tree.insert([7] * 12, second.ids)
    own = pool.frames[np.array(second.ids), 1].tolist()
    second.share(0, cached)
    assert second.ids.tolist() == cached
    assert pool.frames[np.array(cached), 1].tolist() == own
    assert len(tree.match_prefix([7] * 12)[0]) == 3
    pool.check_invariants()


def test_a_sequence_that_seems_the_same_may_lie_elsewhere():
    """Taken back and grown again into the same blocks, which have other frames now."""
    pool = pool_of(num_frames=12)
    table = grown(pool, 12)
    rows = Rows([table])
    rows.reserve([1]).commit()
    rows.changed = []
    ids, frames = list(table.ids), pool.frames[np.array(table.ids)].tolist()
    table.truncate(0)
    grown(pool, 13, table)
    assert list(table.ids) == ids
    assert pool.frames[np.array(table.ids)].tolist() != frames
    assert not rows.seen.holds()
    rows.follow()
    assert rows.changed == [0]


BAD = {
    "windows alone": ((8, (4, 4), 4), "a group of layers that see all tokens"),
    "too few": ((1, (None, 4), 4), "expected 2 frames for a block, got 1"),
    "no window": ((8, (None, 0), 4), r"a window in \[1, "),
    "no frames": ((0, (None, 4), 4), "num_frames"),
    "margin": ((8, (None, 4), 4, -1), "margin to be an integer >= 0, got -1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    arguments, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        FramePool(*arguments)


def busy():
    pool = pool_of(num_frames=18)
    table = grown(pool, 8)
    fork = table.fork()
    grown(pool, 10, table)
    grown(pool, 8, fork)
    assert pool.idle().sum() == 2
    return pool, table, fork, grown(pool, 2)


OPERATIONS = {
    "allocate": lambda pool, *_: pool.allocate(1),
    "allocate and reclaim": lambda pool, *_: pool.allocate(pool.num_free + 1),
    "release": lambda pool, table, fork, _: pool.release(table.ids[3:]),
    "grow": lambda pool, table, *_: grown(pool, 5, table),
    "truncate": lambda pool, table, *_: table.truncate(17),
    "give up": lambda pool, table, *_: table.truncate(0),
    "adopt": lambda pool, table, *_: BlockTable(pool, SIZE).adopt(table.ids, 18),
    "share": lambda pool, table, fork, one: one.share(0, table.ids[4:5]),
    "reclaim": lambda pool, *_: pool.reclaim(1, asked_for=True),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_interrupts_lose_no_frame(name):
    for state, _ in interrupted(busy, lambda state: OPERATIONS[name](*state)):
        pool = state[0]
        frames = sorted([*pool.frames[pool.frames >= 0].tolist(), *pool._spare])
        assert frames == list(range(18))
        held = np.array([pool.reference_count(block) > 0 for block in range(pool.num_blocks)])
        assert (pool.frames[~held] < 0).all()
        assert (pool.frames[held, 0] >= 0).all()


@pytest.mark.parametrize("running", [8, 256])
def test_idle_frames_are_counted_by_the_tables_that_changed(running, monkeypatch):
    """A scheduler asks for their number while a request waits, once a schedule."""
    pool = pool_of(num_frames=running * 30)
    pool.remember()
    tables = [grown(pool, 20) for _ in range(running)]
    rows = Rows(tables)
    pool.num_idle()
    looks = []
    own = BlockTable.block_ids
    monkeypatch.setattr(
        BlockTable, "block_ids", property(lambda t: looks.append(t) or own.__get__(t))
    )
    for _ in range(3):  # the last block has room for them
        rows.reserve([1] * running).commit()
        pool.num_idle()
        looks.clear()
        pool.num_idle()
        assert looks == []
    rows.reserve([0, 2, *[0] * (running - 3), 3]).commit()
    tables[4].truncate(9)
    looks.clear()
    assert pool.num_idle() == pool.idle().sum()
    assert {*map(id, looks)} <= {id(tables[row]) for row in (1, 4, running - 1)}
    assert len(looks) <= 3
    monkeypatch.undo()
    pool.check_invariants()


def test_an_interrupted_count_is_made_anew():
    def start():
        pool = pool_of(num_frames=60)
        tables = [grown(pool, 20), grown(pool, 9)]
        pool.remember()
        tables.append(tables[0].fork())
        assert pool.num_idle() == 0
        grown(pool, 30, tables[1])
        tables[0].truncate(0)
        dropped = grown(pool, 12)
        pool.num_idle()
        del dropped
        return pool, tables

    for (pool, _), _ in interrupted(start, lambda state: state[0].num_idle()):
        pool.check_invariants()


def test_what_is_guarded_or_was_copied_is_not_idle():
    pool = pool_of(num_frames=60)
    tree = RadixTree(pool, SIZE)
    table = grown(pool, 24)
    tokens = list(range(24))
    tree.insert(tokens, table.ids.tolist())
    blocks = table.ids.tolist()
    del table
    assert pool.num_idle() == pool.idle().sum() == 6
    pool.guarded = blocks
    assert pool.num_idle() == pool.idle().sum() == 4  # the next token sees 5 before it
    pool.check_invariants()
    pool.guarded = []
    assert pool.num_idle() == 6
    fork = BlockTable(pool, SIZE)
    fork.adopt(blocks, 22)
    other = fork.fork()
    reservation = Rows([fork]).reserve([1])
    assert reservation.copies
    del other
    pool.check_invariants()
    assert not pool.idle()[reservation.copies[0][0]].any()
    reservation.commit()
    pool.check_invariants()
    assert pool.idle()[blocks[-1]].any()
