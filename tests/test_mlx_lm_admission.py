"""Batches over a store with too few blocks for all: some wait, none takes the others along."""

import copy

import pytest

pytest.importorskip("mlx_lm", reason="the extra mlx-lm is not installed")
import mlx.core as mx
from mlx_lm.generate import BatchGenerator, speculative_generate_step
from mlx_lm.models.cache import LRUPromptCache
from small_models import small_model

from pagedkv import OutOfBlocksError
from pagedkv.mlx_lm import PagedStore

COUNT = 12
PROMPTS = [[5, 7, 11, 2, 3], list(range(1, 40)), [9], [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]]
NEEDS = [-(-(len(prompt) + COUNT) // 4) for prompt in PROMPTS]  # blocks of 4: 5, 13, 4, 6


@pytest.fixture(scope="module")
def expected(model):
    return [alone(model, prompt) for prompt in PROMPTS]


def run(generator, found=None):
    """Run to the end; return tokens by uid, and how many were computed at once at most."""
    found, most = {} if found is None else found, 0
    while responses := generator.next_generated():
        most = max(most, len(responses))
        for response in responses:
            found.setdefault(response.uid, []).append(response.token)
        del response
        responses.clear()  # with the caches of those that ended
    return found, most


def generator_of(model, **options):
    return BatchGenerator(model, **{"max_tokens": COUNT, "prefill_step_size": 7, **options})


def alone(model, prompt, count=COUNT):
    generator = generator_of(model)
    [uid] = generator.insert([prompt], max_tokens=[count])
    return run(generator)[0][uid]


def computed(model, tokens):
    """A cache that holds tokens."""
    cache = model.make_cache()
    model(mx.array([tokens]), cache=cache)
    return cache


@pytest.mark.parametrize(("blocks", "at_once"), [(28, 4), (27, 3), (18, 2), (13, 2)])
def test_sequences_wait_for_those_before_them(model, expected, blocks, at_once):
    with PagedStore(model, num_blocks=blocks, block_size=4) as store:
        generator = generator_of(model)
        uids = generator.insert(PROMPTS)
        found, most = run(generator)
        assert [found[uid] for uid in uids] == expected
        assert most == at_once
        store.forget()
        assert store.stats().free_blocks == blocks


def test_sequences_that_come_later_wait_as_well(model, expected):
    with PagedStore(model, num_blocks=14, block_size=4) as store:
        generator, found = generator_of(model), {}
        uids = generator.insert(PROMPTS[1:2])
        for prompt in (PROMPTS[0], PROMPTS[3], PROMPTS[2]):
            for response in generator.next_generated():
                found.setdefault(response.uid, []).append(response.token)
            uids += generator.insert([prompt])
        found, _ = run(generator, found)
        assert [found[uid] for uid in uids] == [expected[place] for place in (1, 0, 3, 2)]
        assert store.stats().peak_blocks <= 14


def test_one_that_can_never_fit_is_refused_alone(model, expected):
    with PagedStore(model, num_blocks=13, block_size=4) as store:
        generator = generator_of(model)
        [first] = generator.insert(PROMPTS[:1])
        with pytest.raises(ValueError, match=r"52 tokens.* of 41 and max_tokens of 12"):
            generator.insert([PROMPTS[2], list(range(1, 42))])
        with pytest.raises(ValueError, match=r"prompt of 5 and max_tokens of 48"):
            generator.insert(PROMPTS[:1], max_tokens=[48])
        held = computed(model, list(range(1, 30)))
        with pytest.raises(ValueError, match=r"prompt of 41 and max_tokens of 12"):
            generator.insert([list(range(30, 42))], caches=[held])
        del held
        [second] = generator.insert(PROMPTS[1:2])
        found, _ = run(generator)
        assert found == {first: expected[0], second: expected[1]}
        store.forget()
        assert store.stats().free_blocks == 13


def test_cached_prefixes_and_those_of_sequences_that_wait_make_room(model):
    shared = list(range(50, 70))  # five blocks
    prompts = [[*shared, 1], [*shared, 2], [9, 8, 7]]
    expected = [alone(model, prompt) for prompt in prompts]
    with PagedStore(model, num_blocks=12, block_size=4) as store:
        cached = computed(model, shared)
        store.keep(cached, shared)
        forks = [copy.deepcopy(cached) for _ in range(2)]
        del cached
        generator = generator_of(model)
        # The first takes twelve blocks to its end: what the others hold, and the tree, has to go.
        long = list(range(1, 30))
        uids = generator.insert([long], max_tokens=[19])
        uids += generator.insert([[1], [2]], caches=forks, all_tokens=[list(shared), list(shared)])
        forks.clear()
        uids += generator.insert([prompts[2]])
        found, _ = run(generator)
        assert store.stats().peak_blocks == 12
        store.forget()
        assert store.stats().free_blocks == 12
    assert [found[uid] for uid in uids] == [alone(model, long, 19), *expected]


def test_what_they_share_is_counted_once(model):
    shared = list(range(50, 70))  # five blocks
    prompts = [[*shared, last] for last in (1, 2, 3)]
    expected = [alone(model, prompt) for prompt in prompts]
    # Each needs nine blocks, five of which are the same.
    with PagedStore(model, num_blocks=17, block_size=4):
        lru = LRUPromptCache()
        lru.insert_cache("m", shared, list(computed(model, shared)))
        generator = generator_of(model)
        found = [lru.fetch_nearest_cache("m", prompt) for prompt in prompts]
        uids = generator.insert(
            [rest for _, rest in found],
            caches=[cache for cache, _ in found],
            all_tokens=[list(shared) for _ in prompts],
        )
        del found, lru
        answers, most = run(generator)
        assert [answers[uid] for uid in uids] == expected
        assert most == 3


@pytest.mark.parametrize("length", [18, 19, 17, 21])
def test_a_shared_last_block_is_copied_within_the_budget(model, length):
    shared = list(range(50, 50 + length))
    prompts = [[*shared, last] for last in (1, 2, 3)]
    expected = [alone(model, prompt) for prompt in prompts]
    whole = length // 4
    blocks = whole + 3 * (-(-(length + 1 + COUNT) // 4) - whole) + 1
    for num_blocks in (blocks, blocks - 1, blocks - 5):
        with PagedStore(model, num_blocks=num_blocks, block_size=4) as store:
            held = computed(model, shared)
            forks = [copy.deepcopy(held) for _ in prompts]
            generator = generator_of(model)
            uids = generator.insert(
                [prompt[-1:] for prompt in prompts],
                caches=forks,
                all_tokens=[list(shared) for _ in prompts],
            )
            del held, forks
            found, most = run(generator)
            assert [found[uid] for uid in uids] == expected
            assert most == (2 if num_blocks == blocks - 5 else 3)
            store.forget()
            assert store.stats().free_blocks == num_blocks


def test_copies_of_a_shared_block_need_room_beside_it(model):
    shared = list(range(50, 67))  # four blocks, and one token of the fifth
    expected = [alone(model, [*shared, last], 2) for last in (1, 2, 3)]
    # At the end there are four that they share, and the fifth of each.
    with PagedStore(model, num_blocks=7, block_size=4) as store:
        held = computed(model, shared)
        generator = generator_of(model, max_tokens=2)
        uids = generator.insert(
            [[1], [2], [3]],
            caches=[copy.deepcopy(held) for _ in range(3)],
            all_tokens=[list(shared) for _ in range(3)],
        )
        del held
        found, _ = run(generator)
        assert [found[uid] for uid in uids] == expected
        assert store.stats().peak_blocks == 7


def test_what_waits_and_is_not_known_is_not_given_up(model):
    with PagedStore(model, num_blocks=12, block_size=4) as store:
        cache = computed(model, list(range(1, 30)))  # eight blocks, of tokens nobody named
        generator = generator_of(model)
        generator.insert([PROMPTS[0]])
        generator.insert([[7]], caches=[cache])
        del cache
        with pytest.raises(OutOfBlocksError, match="expected 13 free blocks, 12 are left"):
            run(generator)
        assert store.stats().free_blocks == 4
        generator.remove([0])
        assert len(run(generator)[0][1]) == COUNT
        assert store.stats().free_blocks == 12


def test_two_generators_share_a_budget(model, expected):
    with PagedStore(model, num_blocks=13, block_size=4):
        first, second = generator_of(model), generator_of(model)
        first.insert(PROMPTS[:1], max_tokens=[43])  # twelve blocks to its end, two now
        first.next_generated()
        second.insert(PROMPTS[2:3])
        with pytest.raises(OutOfBlocksError, match="expected 16 free blocks, 13 are left"):
            second.next_generated()
        run(first)
        assert run(second)[0] == {0: expected[2]}


def test_a_model_without_a_store_is_not_looked_after(model, expected):
    other = small_model("llama")
    with PagedStore(other, num_blocks=1, block_size=4):
        assert alone(model, PROMPTS[1]) == expected[1]


def test_one_that_is_removed_makes_room(model, expected):
    with PagedStore(model, num_blocks=13, block_size=4) as store:
        generator = generator_of(model)
        uids = generator.insert([PROMPTS[1], PROMPTS[0]])
        assert {response.uid for response in generator.next_generated()} == {uids[0]}
        generator.remove(uids[:1])
        assert run(generator)[0] == {uids[1]: expected[0]}
        store.forget()
        assert store.stats().free_blocks == 13


def test_a_cache_that_the_caller_holds_is_waited_for(model, expected):
    with PagedStore(model, num_blocks=13, block_size=4) as store:
        generator = generator_of(model)
        uids = generator.insert(PROMPTS[:2])
        found, ended = {}, []
        for _ in range(COUNT):
            for response in generator.next_generated():
                found.setdefault(response.uid, []).append(response.token)
                ended += [response.prompt_cache] if response.finish_reason else []
        with pytest.raises(OutOfBlocksError, match="expected 18 free blocks, 13 are left"):
            generator.next_generated()
        assert store.stats().free_blocks == 8
        del response
        ended.clear()
        found, _ = run(generator, found)
        assert [found[uid] for uid in uids] == expected[:2]


def long_prompt(count, start=0):
    return [(start + 7 * number) % 90 + 1 for number in range(count)]


def test_chunks_of_layers_with_a_window_are_counted_as_long_as_they_are():
    """A prompt of 2,400 tokens takes blocks for all of them in each group if computed at once."""
    model = small_model("gemma3_text")  # of three groups
    with PagedStore(model, num_blocks=72, block_size=32) as store:  # 216 in three groups
        at_once, parts = (generator_of(model, prefill_step_size=size) for size in (2400, 600))
        with pytest.raises(ValueError, match=r"expected prompt and answer of 2304 tokens at most"):
            at_once.insert([long_prompt(2400)])
        with pytest.raises(ValueError, match=r"expected prompt and answer of 2304 tokens at most"):
            store.check(2400, COUNT, 2400)
        [uid] = parts.insert([long_prompt(2400)])
        assert len(run(parts)[0][uid]) == COUNT


def test_no_sequence_is_counted_with_longer_chunks_than_its_prompt():
    """Four of 105 tokens, each with 27 blocks that see all and 9 in each window, are 180."""
    model = small_model("gemma3_text")
    prompts = [long_prompt(5, start) for start in range(4)]
    expected = [alone(model, prompt, 100) for prompt in prompts]
    with PagedStore(model, num_blocks=100, block_size=4) as store:  # 300 in three groups
        generator = generator_of(model, max_tokens=100, prefill_step_size=600)
        uids = generator.insert(prompts)
        found, most = run(generator)
        assert most == 4
        assert [found[uid] for uid in uids] == expected
        store.check(5, 1123, 600)
        with pytest.raises(ValueError, match="expected prompt and answer of 1128 tokens at most"):
            store.check(5, 1124, 600)


def test_drafts_are_counted_as_computed_at_once():
    """A pass appends 16 drafts and a token, whatever the prompt: five blocks beside a window's."""
    model, draft = small_model("gemma3_text"), small_model("gemma3_text")
    options = {"num_draft_tokens": 16, "max_tokens": 50}
    expected = [
        token for token, *_ in speculative_generate_step(mx.array([5]), model, draft, **options)
    ]
    for num_blocks, fits in ((11, False), (13, False), (14, True)):
        with (
            PagedStore(model, num_blocks=num_blocks, block_size=4) as store,
            PagedStore(draft, num_blocks=99, block_size=4) as drafts,
        ):
            if not fits:
                with pytest.raises(ValueError, match="expected prompt and answer of"):
                    store.check(1, 50, drafted=16)
                continue
            store.check(1, 50, drafted=16)
            cache = [*store.cache(), *drafts.cache()]
            found = speculative_generate_step(
                mx.array([5]), model, draft, prompt_cache=cache, **options
            )
            assert [token for token, *_ in found] == expected


@pytest.mark.parametrize(
    "numbers", [(5, 5, -1), (5, 5, 0), (5, 5, "x"), (5, 5, None), (-1, 5, 7), (5, 5, 7, -1)]
)
def test_what_is_no_number_of_tokens_is_refused(model, numbers):
    with (
        PagedStore(model, num_blocks=10, block_size=4) as store,
        pytest.raises(ValueError, match=r"expected \w+ (to be an integer|in \[1)"),
    ):
        store.check(*numbers)


def test_what_forks_copy_is_counted_in_windows_as_well():
    """Two pairs of forks: both copies may be made while the block that they share is held."""
    model = small_model("gemma3_text")
    expected = [alone(model, [base, last], 2) for base in (10, 20) for last in (1, 2)]
    for num_blocks in (4, 5, 6):
        with PagedStore(model, num_blocks=num_blocks, block_size=4):
            generator = generator_of(model, max_tokens=2)
            uids = []
            for base in (10, 20):
                held = computed(model, [base])
                uids += generator.insert(
                    [[1], [2]],
                    caches=[copy.deepcopy(held) for _ in range(2)],
                    all_tokens=[[base], [base]],
                )
                del held
            found, _ = run(generator)
            assert [found[uid] for uid in uids] == expected


def test_what_left_the_windows_of_a_cache_that_somebody_holds_makes_room():
    model = small_model("gemma3_text")
    expected = alone(model, long_prompt(200, 5))
    with PagedStore(model, num_blocks=100, block_size=4):  # 300 in three groups
        held = computed(model, long_prompt(360))  # 90, and seven of each window
        generator = generator_of(model)
        [uid] = generator.insert([long_prompt(200, 5)])
        assert run(generator)[0][uid] == expected
        assert len(held[0].sequences.tables[0].block_ids) == 90


def test_what_was_given_up_is_computed_again_in_its_namespace(model):
    """Or one tenant would find what another has asked."""
    shared = list(range(50, 70))
    with PagedStore(model, num_blocks=12, block_size=4) as store:
        cached = computed(model, shared)
        store.keep(cached, shared, namespace="a")
        del cached
        generator, namespaces = generator_of(model, max_tokens=2), []
        generator.insert([list(range(1, 30))], max_tokens=[19])
        caches = [store.cache([*shared, 1], namespace="a")]
        generator.insert([[1]], caches=caches, all_tokens=[list(shared)])
        caches.clear()
        while responses := generator.next_generated():
            ended = [one.prompt_cache for one in responses if one.finish_reason]
            namespaces += [layers[0].sequences.tables[0].namespace for layers in ended]
            ended.clear()
            responses.clear()
        assert namespaces == [None, "a"]
