import numpy as np
import pytest

from pagedkv import SlotMapping


def test_slots_keep_their_order():
    mapping = SlotMapping.from_slots(np.array([9, 0, 11]), block_size=4, num_blocks=3)
    assert mapping.slots.tolist() == [9, 0, 11]
    assert (mapping.block_size, mapping.num_blocks) == (4, 3)


@pytest.mark.parametrize(
    ("slots", "block_size", "num_blocks", "message"),
    [
        ([], 4, 3, "slots to have at least one entry"),
        ([0, 12], 4, 3, r"slots in \[0, 12\), got 12"),
        ([5, -1], 4, 3, r"slots in \[0, 12\), got -1"),
        ([5, 2, 7, 2], 4, 3, "each slot once, got 2 twice"),
        ([[1, 2]], 4, 3, "slots to be one-dimensional"),
        ([1.0], 4, 3, "slots to hold integers"),
        ([1], 0, 3, "block_size in"),
        ([1], 4, 1.5, "num_blocks to be an integer"),
        ([1], 2**16, 2**15, r"num_blocks \* block_size in .* got 2147483648"),
    ],
)
def test_slots_refused(slots, block_size, num_blocks, message):
    with pytest.raises(ValueError, match=message):
        SlotMapping.from_slots(slots, block_size=block_size, num_blocks=num_blocks)
