import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv import DecodeBatch, blocks_needed


def test_full_blocks_have_no_mask():
    batch = DecodeBatch.from_tables([[7, 2], [0, 5]], [8, 8], block_size=4, num_blocks=8)
    assert batch.block_tables.tolist() == [[7, 2], [0, 5]]
    assert batch.context_lens.tolist() == [8, 8]
    assert batch.mask is None
    assert (batch.block_size, batch.num_blocks) == (4, 8)


def test_ragged_rows_repeat_their_own_first_block():
    batch = DecodeBatch.from_tables([[3], [6, 1, 4]], [2, 9], block_size=4, num_blocks=7)
    assert batch.block_tables.tolist() == [[3, 3, 3], [6, 1, 4]]
    assert batch.mask.shape == (2, 1, 1, 12)
    assert batch.mask[0, 0, 0].tolist() == [True] * 2 + [False] * 10
    assert batch.mask[1, 0, 0].tolist() == [True] * 9 + [False] * 3


def test_blocks_past_the_context_are_left_out():
    batch = DecodeBatch.from_tables([[3, 2, 1]], [4], block_size=4, num_blocks=4)
    assert batch.block_tables.tolist() == [[3]]
    assert batch.mask is None


def test_numpy_rows_and_lengths():
    tables = np.array([[1, 0], [2, 3]], dtype=np.uint16)
    batch = DecodeBatch.from_tables(tables, np.array([3, 4]), block_size=2, num_blocks=4)
    assert batch.block_tables.tolist() == [[1, 0], [2, 3]]


BAD = {
    "empty batch": ([], [], 4, 8, "empty batch"),
    "fewer lengths than tables": ([[1], [2]], [3], 4, 8, "one context length per block table"),
    "zero context": ([[1], [2]], [3, 0], 4, 8, "context lengths >= 1, got 0 in row 1"),
    "negative context": ([[1]], [-3], 4, 8, "context lengths >= 1, got -3"),
    "table too short": ([[1]], [5], 4, 8, "at least 2 blocks for 5 tokens in row 0, got 1"),
    "empty table": ([[]], [1], 4, 8, "block table 0 to have at least one entry"),
    "id too large": ([[1], [8]], [1, 1], 4, 8, r"block ids in \[0, 8\), got 8 in row 1"),
    "negative id": ([[-1]], [1], 4, 8, r"block ids in \[0, 8\), got -1"),
    "bad id past the context": ([[1, 99]], [1], 4, 8, "got 99"),
    "float ids": ([[1.0]], [1], 4, 8, "to hold integers, got float64"),
    "float lengths": ([[1]], [1.5], 4, 8, "context_lens to hold integers"),
    "bool ids": ([[True]], [1], 4, 8, "to hold integers, got bool"),
    "nested table": ([[[1]]], [1], 4, 8, "one-dimensional"),
    "zero block size": ([[1]], [1], 0, 8, r"block_size in \[1, .*\], got 0"),
    "float block size": ([[1]], [1], 4.0, 8, r"block_size to be an integer, got 4\.0"),
    "no blocks": ([[0]], [1], 4, 0, r"num_blocks in \[1, .*\], got 0"),
    "NaN blocks": ([[0]], [1], 4, float("nan"), "num_blocks to be an integer, got nan"),
    "ids beyond 32 bits": ([[0]], [1], 4, 2**31, "num_blocks in .*, got 2147483648"),
    "a context beyond memory": ([[0]], [10**15], 4, 8, "at least 250000000000000 blocks"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tables_are_refused_before_anything_reaches_the_device(name, monkeypatch):
    monkeypatch.setattr(mx, "array", None)
    tables, lens, block_size, num_blocks, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        DecodeBatch.from_tables(tables, lens, block_size=block_size, num_blocks=num_blocks)


@settings(deadline=None)  # the first call of MLX takes long
@given(st.data())
def test_every_position_maps_to_its_block(data):
    block_size = data.draw(st.integers(1, 9))
    num_blocks = data.draw(st.integers(1, 40))
    lens = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=5))
    tables = [
        data.draw(
            st.lists(
                st.integers(0, num_blocks - 1),
                min_size=blocks_needed(length, block_size),
                max_size=blocks_needed(length, block_size) + 3,
            )
        )
        for length in lens
    ]
    batch = DecodeBatch.from_tables(tables, lens, block_size=block_size, num_blocks=num_blocks)
    rows = batch.block_tables.tolist()
    width = len(rows[0]) * block_size
    assert len(rows[0]) == max(blocks_needed(length, block_size) for length in lens)
    for b, length in enumerate(lens):
        assert all(rows[b][t // block_size] == tables[b][t // block_size] for t in range(length))
        assert all(0 <= block < num_blocks for block in rows[b])
        visible = [True] * width if batch.mask is None else batch.mask[b, 0, 0].tolist()
        assert visible == [t < length for t in range(width)]
