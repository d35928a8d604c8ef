"""Which waiting sequences of a `BatchGenerator` may start: those with blocks to their end."""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

import numpy as np
from mlx_lm.generate import BatchGenerator

from pagedkv.errors import OutOfBlocksError
from pagedkv.host.block_table import BlockTable, blocks_needed
from pagedkv.limits import count_of, positive_int32
from pagedkv.mlx_lm.layer import sequences_of
from pagedkv.mlx_lm.memory import Memory
from pagedkv.mlx_lm.sequences import Sequences

# A sequence, the tokens that it will have at most, and how many of them are computed at once.
_Entry = tuple[BlockTable, int, int]
_ToCome = tuple[int, float]  # tokens of the prompt and of the answer
CHUNK = 2048  # tokens of a prompt that mlx-lm computes at once, if nothing else is said
_SEGMENTS, _MAX_TOKENS, _CACHE, _TOKENS = 1, 2, 3, 4  # of what waits in a BatchGenerator


class Admission:
    """Starts a sequence when all running ones will have blocks to their last token.

    Blocks held elsewhere count as well, except those that are freed on demand: cached prefixes, the
    prefixes of waiting sequences, and caches that are marked as spare.

    Parameters
    ----------
    memory : Memory
        Whose blocks are given out.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._generators: weakref.WeakSet[BatchGenerator] = weakref.WeakSet()
        memory.kv.pool.reclaimers.append(self._give_up)

    def check(
        self, prompt_tokens: int, max_tokens: int, chunk: int = CHUNK, drafted: int = 0
    ) -> None:
        """Raise ValueError for a request that would not fit into an empty store.

        Parameters
        ----------
        prompt_tokens, max_tokens : int
            Tokens of the prompt, and of the answer at most.
        chunk : int
            Tokens of a prompt that are computed at once, mlx-lm's `prefill_step_size`.
        drafted : int
            Draft tokens that are computed with the next one, mlx-lm's `num_draft_tokens`.

        Raises
        ------
        ValueError
            If prompt and answer together have more tokens than the store, or one of these is no
            number of tokens.
        PagedKVError
            If the store is closed.
        """
        self._memory.check_open()
        kv = self._memory.kv
        tokens = count_of(prompt_tokens, "prompt_tokens") + count_of(max_tokens, "max_tokens")
        drafted = count_of(drafted, "drafted")
        most = _at_once(prompt_tokens, positive_int32(chunk, "chunk"), drafted)
        blocks, at_once = (blocks_needed(n, kv.block_size) for n in (tokens + drafted, most))
        if kv.pool.blocks_held(blocks, at_once) > kv.pool.num_blocks:
            longest = max(0, self._longest(at_once) - drafted)
            raise ValueError(
                f"expected prompt and answer of {longest} tokens at most, the whole paged "
                f"store, got a prompt of {prompt_tokens} and max_tokens of {max_tokens}"
            )

    def _longest(self, at_once: int) -> int:
        """Return how many tokens a sequence can have at most."""
        kv = self._memory.kv
        sizes = range(kv.pool.num_blocks + 1)
        fitting = bisect_right(
            sizes,
            kv.pool.num_blocks,
            key=lambda size: kv.pool.blocks_held(size, at_once),
        )
        return (fitting - 1) * kv.block_size

    def admit(self, generator: BatchGenerator, count: int) -> int:
        """Return how many of the first `count` waiting sequences may begin; the others wait.

        Parameters
        ----------
        generator : BatchGenerator
            In which they wait, while none of its passes is under way.
        count : int
            Sequences that it would begin with.

        Raises
        ------
        PagedKVError
            If the store is closed.
        """
        self._memory.check_open()
        self._generators.add(generator)
        return self._count(generator, count)[0]

    def shortage(self, generator: BatchGenerator) -> OutOfBlocksError:
        """Return what to raise if the first that waits may not begin, and nothing will end."""
        return OutOfBlocksError(self._count(generator, 1)[1], self._memory.kv.pool.num_blocks)

    def _count(self, generator: BatchGenerator, count: int) -> tuple[int, int]:
        """Return how many may begin, and the blocks that it would take with one more."""
        memory = self._memory
        memory.collect()
        waiting = list(generator._unprocessed_sequences)
        running = [found for other in self._generators for found in _running(other)]
        entries = [entry for one in running for entry in _entries(*one)]
        known = {id(sequences) for sequences, *_ in running}
        known |= {
            id(sequences_of(item[_CACHE]))
            for other in self._generators
            for item in other._unprocessed_sequences
            if _can_give_up(item)
        }
        held = {id(other): other for other in memory.live if id(other) not in known}
        needed = 0
        for place, item in enumerate(waiting[:count]):
            sequences = sequences_of(item[_CACHE])
            if sequences is not None:
                held.pop(id(sequences), None)
                to_come = [(sum(map(len, item[_SEGMENTS])), item[_MAX_TOKENS])]
                entries += _entries(sequences, to_come, generator.prefill_step_size)
            others = [
                (table, table.num_tokens, 1)
                for other in held.values()
                if not other.is_spare
                for table in other.tables
            ]
            needed = self._needed([*entries, *others])
            if needed > memory.kv.pool.num_blocks:
                return place, needed
        return count, needed

    def _needed(self, entries: list[_Entry]) -> int:
        """Return the most blocks that sequences will hold at once.

        What they share of layers that see everything counts once.
        """
        kv = self._memory.kv
        ids = [table.block_ids for table, *_ in entries]
        held = np.concatenate([np.empty(0, np.int32), *ids])
        holders = np.bincount(held, minlength=kv.pool.num_blocks)
        more, copied = 0, set()
        for table, tokens, _ in entries:
            own = table.block_ids
            more += blocks_needed(tokens, kv.block_size) - len(own)
            if table.num_tokens % kv.block_size and holders[own[-1]] > 1:
                more += 1  # its last block is copied, while others hold it
                copied.add(int(own[-1]))
        blocks = int(np.count_nonzero(holders)) + more
        # What is copied is there beside the copies, which are counted with their sequences.
        counts = [(tokens, at_once) for _, tokens, at_once in entries] + [(1, 1)] * len(copied)
        windows, whole = 0, kv.groups.windows.count(None)
        for tokens, at_once in counts:
            size, most = (blocks_needed(count, kv.block_size) for count in (tokens, at_once))
            windows += kv.pool.blocks_held(size, most) - whole * size
        return whole * blocks + windows

    def _give_up(self, count: int) -> bool:
        """Take the cached prefix from the last one that waits with any: it is computed again."""
        for generator in list(self._generators):
            waiting = generator._unprocessed_sequences
            for place in reversed(range(len(waiting))):
                uid, segments, max_tokens, cache, tokens, *others = waiting[place]
                if tokens and _can_give_up(waiting[place]):
                    first, *rest = segments
                    again = [[*tokens, *first], *rest] if rest else [list(tokens), first]
                    sequences = sequences_of(cache)
                    assert sequences is not None
                    namespace = sequences.tables[0].namespace
                    cache = generator.model.make_cache(namespace=namespace)
                    waiting[place] = (uid, again, max_tokens, cache, [], *others)
                    return True
        return False


def _running(generator: BatchGenerator) -> Iterator[tuple[Sequences, list[_ToCome], int]]:
    """Yield what a generator computes, what is to come of each, and how many tokens at once."""
    prompts, answers = generator._prompt_batch, generator._generation_batch
    if sequences := sequences_of(prompts.prompt_cache):
        parts = zip(generator._currently_processing, prompts.max_tokens, strict=True)
        to_come = [(sum(map(len, item[0])), most) for item, most in parts]
        yield sequences, to_come, generator.prefill_step_size
    if sequences := sequences_of(answers.prompt_cache):
        # A token that was sampled is computed when it is handed out, the last one too.
        counts = zip(answers.max_tokens, answers._num_tokens, strict=True)
        yield sequences, [(0, most - done) for most, done in counts], 1


def _entries(sequences: Sequences, to_come: list[_ToCome], chunk: int) -> list[_Entry]:
    return [
        (table, table.num_tokens + prompt + int(answer), _at_once(prompt, chunk))
        for table, (prompt, answer) in zip(sequences.tables, to_come, strict=True)
    ]


def _at_once(prompt: int, chunk: int, drafted: int = 0) -> int:
    """Return how many tokens of a prompt and its answer are computed at once."""
    return max(1 + drafted, min(prompt, chunk))


def _can_give_up(item: tuple[Any, ...]) -> bool:
    """Whether a waiting sequence can do without its cache: the tokens in it are known."""
    sequences = sequences_of(item[_CACHE])
    return sequences is not None and sequences.tables[0].num_tokens == len(item[_TOKENS])
