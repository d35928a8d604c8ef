"""Work items: every context is covered, and the device is busy to the end."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.attention.cut import TUNING, Tuning, cut, tuning_for

# A group starts in the time of a trip; joining takes two. Reads cost nothing.
PLAIN = Tuning(
    processors=16,
    warps=(4,),
    resident=4,
    heavy=4,
    bandwidth=math.inf,
    trip=1,
    start=1,
    start_warp=0,
    join=2,
    join_part=0,
    merge_warps=4,
)
H100 = TUNING["NVIDIA H100 80GB HBM3"]
HEADS = {"groups": 8, "warp_tokens": 8, "token_bytes": 512}


def items_of(lens, tuning, **sizes):
    lens = np.array(lens)
    return cut(lens, np.zeros_like(lens), tuning, **sizes)


@given(
    lens=st.lists(st.integers(1, 5000), min_size=1, max_size=40),
    window=st.none() | st.integers(1, 3000),
    tuning=st.builds(
        Tuning,
        processors=st.integers(1, 140),
        warps=st.sampled_from([(4,), (16,), (4, 8, 16)]),
        resident=st.sampled_from([4, 16]),
        heavy=st.sampled_from([4, 8]),
        bandwidth=st.floats(1, 1e5),
        trip=st.floats(0.1, 2),
        start=st.floats(0, 5),
        start_warp=st.floats(0, 1),
        join=st.floats(0, 5),
        join_part=st.floats(0, 1),
        merge_warps=st.just(4),
    ),
    warp_tokens=st.sampled_from([2, 8, 32]),
    heavy=st.booleans(),
)
def test_every_token_is_in_one_item(lens, window, tuning, warp_tokens, heavy):
    lens = np.array(lens)
    starts = np.zeros_like(lens) if window is None else np.maximum(lens - window, 0) // 8 * 8
    sizes = {"groups": 8, "warp_tokens": warp_tokens, "token_bytes": 512, "heavy": heavy}
    warps, tile, work, rows = cut(lens, starts, tuning, **sizes)
    assert warps in tuning.warps
    assert warps <= max(tuning.heavy if heavy else tuning.resident, min(tuning.warps))
    assert tile == warps * warp_tokens
    assert rows[:, 1].sum() - rows[:, 0].sum() == len(work)
    for b, (first, last) in enumerate(rows):
        items = work[first:last]
        assert (items[:, 0] == b).all()
        assert (items[:, 3] == lens[b]).all()
        # One after the other from the first token seen to the last, none empty.
        assert items[0, 1] == starts[b]
        assert items[-1, 2] == lens[b]
        assert (items[1:, 1] == items[:-1, 2]).all()
        assert (items[:, 1] < items[:, 2]).all()
        assert ((items[:-1, 2] - items[:-1, 1]) % tile == 0).all()


@pytest.mark.parametrize(
    ("lens", "expected"),
    [
        ([4096], 16),  # every processor has a part
        ([100], 1),  # too short to be worth cutting
        ([4096] * 16, 16),  # a sequence for each processor: nothing to join
        ([4096] * 4, 16),
        ([1024] * 17, 34),  # the 17th alone would take as long as the other 16
        ([32768] + [1024] * 15, 31),  # the long one is cut, the short ones are not
    ],
)
def test_items_fill_rounds(lens, expected):
    sizes = {"groups": 1, "warp_tokens": 32, "token_bytes": 0}
    assert len(items_of(lens, PLAIN, **sizes).items) == expected


@pytest.mark.parametrize(
    ("batch", "context", "warps", "items"),
    [
        (1, 1024, 4, 16),  # small groups start sooner
        (1, 32768, 8, 32),  # and many of them keep the memory busy
        (4, 32768, 4, 64),
        (16, 1024, 8, 16),
        (16, 16384, 16, 16),  # each sequence has an item of its own: none to join
        (64, 1024, 4, 64),
    ],
)
def test_what_an_h100_was_fastest_with(batch, context, warps, items):
    chosen = items_of([context] * batch, H100, **HEADS)
    assert (chosen.warps, len(chosen.items)) == (warps, items)


def test_what_an_h200_was_fastest_with():
    chosen = items_of([1024] * 16, TUNING["NVIDIA H200"], **HEADS)
    assert (chosen.warps, len(chosen.items)) == (16, 16)  # 24.0 us; 26.0 as an H100 has it


def test_reads_beside_each_other_take_longer():
    fast = replace(H100, bandwidth=10 * H100.bandwidth)
    assert len(items_of([4096], H100, **HEADS).items) <= len(items_of([4096], fast, **HEADS).items)


def test_heavy_threads_leave_less_room():
    assert items_of([16384] * 16, H100, **HEADS, heavy=True).warps <= H100.heavy


def test_a_gpu_of_nobody_has_the_constants_of_its_backend():
    assert tuning_for("NVIDIA H100 80GB HBM3", "cuda") is H100
    assert tuning_for("a GPU of nobody", "cuda") is TUNING["cuda"]
    assert tuning_for("Apple M9", "metal") is TUNING["metal"]
    assert tuning_for(None, "metal") is TUNING["metal"]


def test_no_more_items_than_a_launch_takes():
    for lens in ([16384] + [64] * 33000, [100000] * 33000):
        assert len(items_of(lens, H100, groups=1, warp_tokens=2, token_bytes=256).items) < 2**16
