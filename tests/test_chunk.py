"""Chunks: how they are cut into pieces, and attention over what is gathered for each."""

import mlx.core as mx
import numpy as np
import pytest
from cases import TOLERANCE, Case, assert_close, poison
from reference import attend_one, random

from pagedkv import PagedKVCache, ScoreOptions
from pagedkv.attention import chunk
from pagedkv.attention.chunk import pieces_of, tile_of


def cut(lens, query_len, window=None, rounded=1):
    """Pieces as (rows, tokens, padding, tiles, length, spans)."""
    runs = pieces_of(np.array(lens), query_len, window, rounded)
    return [
        [
            (
                (piece.rows.start, piece.rows.stop),
                (piece.tokens.start, piece.tokens.stop),
                *(piece.padding, piece.tiles, piece.length),
                [tuple(span) for span in piece.spans.tolist()],
            )
            for piece in run
        ]
        for run in runs
    ]


def test_sequences_of_one_length_go_together():
    first, second = cut([40, 40, 57], 16)
    assert first == [((0, 2), (0, 16), 0, 1, 40, [(0, 0, 40, 40, 0, 16), (1, 0, 40, 40, 0, 16)])]
    assert second == [((2, 3), (0, 16), 0, 1, 57, [(2, 0, 57, 57, 0, 16)])]


def test_query_tokens_are_rounded_up_and_kv_by_as_many():
    assert cut([1000], 100, rounded=64) == [
        [((0, 1), (0, 100), 28, 1, 1028, [(0, 0, 1000, 1000, 0, 100)])]
    ]


def test_one_token_of_each_sequence_is_one_piece():
    [[piece]] = cut([5, 33], 1)
    assert piece == ((0, 2), (0, 1), 0, 1, 33, [(0, 0, 5, 5, 0, 1), (1, 0, 33, 33, 0, 1)])
    [[piece]] = cut([5, 33], 1, window=8)
    assert piece == ((0, 2), (0, 1), 0, 1, 8, [(0, 0, 5, 5, 0, 1), (1, 25, 8, 33, 0, 1)])


def test_with_a_window_tiles_follow_the_tokens_that_see_everything():
    """512 tokens, a window of 200: tiles of 128 see 327."""
    assert tile_of(200) == 128
    [[whole, tiled]] = cut([512], 512, window=200)
    assert whole == ((0, 1), (0, 200), 0, 1, 200, [(0, 0, 200, 512, 0, 200)])
    assert tiled[:5] == ((0, 1), (200, 512), 72, 3, 327)
    assert tiled[5] == [
        (0, 1, 327, 512, 200, 128),
        (0, 129, 327, 512, 328, 128),
        (0, 257, 255, 512, 456, 56),
    ]


def test_after_a_window_all_is_tiled():
    [[piece]] = cut([900], 32, window=128, rounded=64)
    assert piece == ((0, 1), (0, 32), 32, 1, 191, [(0, 741, 159, 900, 0, 32)])


def test_a_window_that_nothing_leaves_changes_nothing():
    assert cut([100, 90], 20, window=100) == cut([100, 90], 20)


@pytest.mark.parametrize(("window", "tile"), [(1, 128), (128, 128), (1024, 256), (4096, 512)])
def test_tiles(window, tile):
    assert tile_of(window) == tile


@pytest.mark.parametrize("window", [None, 1, 7, 130, 600])
@pytest.mark.parametrize("rounded", [1, 64])
def test_each_query_token_is_in_one_piece_that_has_what_it_sees(window, rounded):
    rng = np.random.default_rng(5)
    for _ in range(40):
        lens = rng.integers(1, 700, rng.integers(1, 4))
        query_len = int(rng.integers(1, lens.min() + 1))
        seen = np.zeros((len(lens), query_len), int)
        for run in pieces_of(lens, query_len, window, rounded):
            for piece in run:
                count = piece.tokens.stop - piece.tokens.start + piece.padding
                assert count % piece.tiles == 0
                per_tile = count // piece.tiles
                spans = piece.spans.reshape(-1, piece.tiles, 6)
                for row, tiles in zip(range(piece.rows.start, piece.rows.stop), spans, strict=True):
                    for number in range(piece.tokens.stop - piece.tokens.start):
                        span = tiles[number // per_tile].tolist()
                        sequence, first, tokens, context, first_query, queries = span
                        assert (sequence, context) == (row, lens[row])
                        query = piece.tokens.start + number
                        assert query == first_query + number % per_tile < first_query + queries
                        own = context - query_len + query
                        begin = 0 if window is None else max(0, own - window + 1)
                        assert first <= begin
                        assert own < first + tokens <= first + piece.length
                        if piece.mask == "causal":
                            place = number % per_tile
                            assert begin == first
                            assert piece.length - per_tile + place == own - first
                        elif piece.mask is not None and query_len > 1:
                            shown = np.array(piece.mask)[number % per_tile].nonzero()[0] + first
                            assert (shown[0], shown[-1]) == (begin, own)
                            assert len(shown) == own - begin + 1
                        seen[row, query] += 1
        assert (seen == 1).all()


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"sinks": np.linspace(-2.0, 3.0, 8)}])
def test_no_array_has_all_scores(options, monkeypatch):
    """Not of 768 query tokens over 1,536: no mask, and no product where there is no softcap."""
    largest = []
    own = chunk.grouped

    def grouped(queries, keys, *others):
        largest.append(queries.shape[2] * keys.shape[2])
        return own(queries, keys, *others)

    monkeypatch.setattr(chunk, "grouped", grouped)
    for window in (None, 300):
        case = Case([1536], query_len=768, heads=(8, 2), head_dim=8, block_size=32)
        path = "gather_rows_grouped" if "softcap" in options else "gather_rows"
        mx.eval(case.attend(path, window=window, **options) if window else case.attend(path))
        [run] = pieces_of(np.array([1536]), 768, window, 1)
        for piece in run:
            assert piece.mask == "causal" or piece.mask.shape[0] <= 512
    assert all(size <= chunk.SCORED * 1536 for size in largest)
    assert bool(largest) == ("softcap" in options)


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [*((mx.float16, bits) for bits in (None, 8, 4, (8, None), (None, 4))), (mx.float32, None)],
    ids=str,
)
@pytest.mark.parametrize("window", [None, 20])
def test_a_chunk_writes_and_attends(storage, dtype, window, bits):
    """Two sequences of other lengths, three chunks each; the first is longer than the window."""
    tolerance = {None: TOLERANCE[dtype], 8: 0.02}.get(bits, 0.3)
    rng = np.random.default_rng(7)
    cache = PagedKVCache(
        num_layers=1, num_blocks=64, block_size=8, kv_heads=2, head_dim=64, dtype=dtype, bits=bits
    )
    tables = [cache.new_table(), cache.new_table()]
    cache.pool.release(cache.pool.allocate(64)[::-1])
    held = [[np.zeros((0, 2, 64))] * 2 for _ in tables]
    with cache.extend(tables[:1], [5]) as step:
        new = [random(rng, (1, 2, 5, 64), dtype) for _ in "kv"]
        cache.write(0, *new, step.slots)
    held[0] = [np.array(x[0].astype(mx.float32)).swapaxes(0, 1) for x in new]
    for count in (30, 9, 70):
        queries = random(rng, (2, 4, count, 64), dtype)
        new = [random(rng, (2, 2, count, 64), dtype) for _ in "kv"]
        with cache.extend(tables, [count] * 2) as step:
            scores = ScoreOptions(window=window)
            out = step.attend(0, queries, *new, scale=0.125, scores=scores)
            mx.eval(out)
        assert out.dtype == dtype
        for b in range(2):
            held[b] = [
                np.concatenate([old, np.array(x[b].astype(mx.float32)).swapaxes(0, 1)])
                for old, x in zip(held[b], new, strict=True)
            ]
            keys, values = held[b]
            asked, got = (np.array(x[b].astype(mx.float32), np.float64) for x in (queries, out))
            for i in (0, 1, count // 2, count - 1):
                end = len(keys) - count + i + 1
                seen = slice(0 if window is None else max(0, end - window), end)
                for h in range(4):
                    right = attend_one(asked[h, i], keys[seen, h // 2], values[seen, h // 2], 0.125)
                    error = np.linalg.norm(got[h, i] - right) / np.linalg.norm(right)
                    assert error <= tolerance, (count, b, i, h)


@pytest.mark.parametrize("head_dim", [4, 12, 80, 192, 320])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
def test_head_dims(storage, head_dim, dtype):
    case = Case([70, 70, 33], query_len=20, head_dim=head_dim, dtype=dtype)
    assert_close(case.attend("gather_rows"), case.expected(), dtype)


@pytest.mark.parametrize("window", [None, 16])
def test_stale_numbers_are_not_read(storage, window):
    case = Case([70, 33], query_len=20, dtype=mx.float16)
    poison(case, window)
    out = case.attend("gather_rows", window=window) if window else case.attend("gather_rows")
    assert_close(out, case.expected(window=window), mx.float16)
