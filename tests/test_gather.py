import mlx.core as mx
import numpy as np
import pytest
from reference import in_layout, random

from pagedkv import DecodeBatch, Layout, append_block, gather_blocks, gather_rows


@pytest.mark.parametrize("layout", Layout)
def test_gather_reads_literal_slots(layout):
    pool = mx.arange(5 * 2 * 3 * 4).reshape(5, 2, 3, 4)  # N=5, S=2, Hkv=3, D=4
    batch = DecodeBatch.from_tables([[4, 0], [2, 3]], [4, 3], block_size=2, num_blocks=5)
    out = np.array(gather_blocks(in_layout(pool, layout), batch, layout=layout))
    assert out.shape == (2, 3, 4, 4)
    for b, slots in enumerate([[(4, 0), (4, 1), (0, 0), (0, 1)], [(2, 0), (2, 1), (3, 0), (3, 1)]]):
        for position, (block, offset) in enumerate(slots):
            for head in range(3):
                expected = pool[block, offset, head].tolist()
                assert out[b, head, position].tolist() == expected


def test_row_gather_reads_literal_slots():
    pool = mx.arange(5 * 2 * 3 * 4).reshape(5, 2, 3, 4)  # N=5, S=2, Hkv=3, D=4
    batch = DecodeBatch.from_tables([[4, 0], [2]], [3, 1], block_size=2, num_blocks=5)
    out = np.array(gather_rows(pool, batch))
    assert out.shape == (2, 3, 3, 4)
    # The second sequence has one token, which stands for those that it lacks.
    for b, slots in enumerate([[(4, 0), (4, 1), (0, 0)], [(2, 0)] * 3]):
        for position, (block, offset) in enumerate(slots):
            for head in range(3):
                assert out[b, head, position].tolist() == pool[block, offset, head].tolist()


@pytest.mark.parametrize("layout", Layout)
def test_append_replaces_one_block_and_leaves_the_old_pool(layout):
    rng = np.random.default_rng(5)
    pool = random(rng, (6, 4, 2, 8), mx.float16)
    block = random(rng, (4, 2, 8), mx.float16)
    old = in_layout(pool, layout)
    before = np.array(old)
    shaped = block if layout is Layout.BLOCK_MAJOR else block.swapaxes(0, 1)
    new = append_block(old, shaped, 3, layout=layout)
    expected = np.array(pool)
    expected[3] = np.array(block)
    back = new if layout is Layout.BLOCK_MAJOR else new.transpose(1, 2, 0, 3)
    assert np.array_equal(np.array(back), expected)
    assert np.array_equal(np.array(old), before)


def test_append_refuses():
    pool = mx.ones((6, 4, 2, 8))
    with pytest.raises(ValueError, match=r"block id in \[0, 6\), got 6"):
        append_block(pool, mx.ones((4, 2, 8)), 6)
    with pytest.raises(ValueError, match=r"block id in \[0, 6\), got -1"):
        append_block(pool, mx.ones((4, 2, 8)), -1)
    with pytest.raises(ValueError, match=r"block id in \[0, 6\), got 1\.5"):
        append_block(pool, mx.ones((4, 2, 8)), 1.5)
    with pytest.raises(ValueError, match="not a valid Layout"):
        append_block(pool, mx.ones((4, 2, 8)), 0, layout="diagonal")
    with pytest.raises(ValueError, match=r"block of shape \(4, 2, 8\), got \(2, 4, 8\)"):
        append_block(pool, mx.ones((2, 4, 8)), 0)
    with pytest.raises(ValueError, match="block of dtype"):
        append_block(pool, mx.ones((4, 2, 8), dtype=mx.float16), 0)
    with pytest.raises(ValueError, match="expected pool with 4 dimensions"):
        append_block(mx.ones((6, 8)), mx.ones((8,)), 0)


def test_gathers_refuse_a_pool_of_another_size():
    batch = DecodeBatch.from_tables([[0, 1], [2]], [5, 4], block_size=4, num_blocks=5)
    with pytest.raises(ValueError, match="head_major layout with 5 blocks of 4 tokens"):
        gather_blocks(mx.ones((5, 4, 2, 8)), batch, layout=Layout.HEAD_MAJOR)
    with pytest.raises(ValueError, match="block_major layout with 5 blocks of 4 tokens"):
        gather_rows(mx.ones((4, 4, 2, 8)), batch)
