"""What sequences find in the prefix cache, and leave there."""

from engine import engine


def test_what_is_finished_is_found_again():
    run = engine()
    run.add("a", [1, 2, 3, 4, 5, 6, 7, 8], 2)
    run.drain()
    run.add("b", [1, 2, 3, 4, 5, 6, 7, 8], 2)
    step = run.scheduler.schedule()
    # The second block holds the last token, which is computed for what follows it.
    assert (step.counts, step.tables[0].block_ids.tolist()) == ([4], [0, 2])
    run.update(run.compute(step))
    assert step.tables[0].block_ids.tolist() == [0, 1]  # the cached one, its own is free again
    run.drain()
    stats = run.scheduler.stats()
    assert (stats.prompt_tokens, stats.hit_tokens, stats.hit_rate) == (16, 4, 0.25)
    assert (stats.blocks_live, stats.blocks_cached) == (0, 2)


def test_eight_requests_that_arrive_together_compute_their_prefix_once():
    run = engine(num_blocks=1024, block_size=16, max_tokens=2048)
    prefix = list(range(4096))
    for number in range(8):
        run.add(number, [*prefix, 5000 + number, 1, 2], 3)
    assert run.step().request_ids == [0]
    assert run.step().request_ids == [0]
    step = run.step()  # what is left of the first, and all others from the prefix on
    assert step.request_ids == [0, 1, 2, 3, 4, 5, 6, 7]
    assert step.counts == [3] * 8
    assert run.scheduler.stats().blocks_live == 256 + 8
    run.drain()
    assert run.scheduler.stats().hit_tokens == 7 * 4096


def test_namespaces_compute_their_own():
    run = engine()
    run.add("a", range(8), 1, namespace="x")
    run.drain()
    run.add("b", range(8), 1, namespace="y")
    assert run.step().counts == [8]
    assert run.scheduler.stats().hit_tokens == 0


def test_a_fork_that_outlives_its_parent_keeps_what_they_share():
    """The parent's blocks were cached unlocked: they counted as free for admission and were not."""
    run = engine(num_blocks=12)
    run.add("a", range(9), 3)
    run.step()
    run.scheduler.fork("a", "b", 70)
    run.tokens["b"], run.limits["b"] = [*run.tokens["a"][:-1], 70], 12
    run.namespaces["b"] = None
    run.step()
    run.scheduler.finish("a")
    run.scheduler.check_invariants()
    stats = run.scheduler.stats()
    assert (stats.blocks_live, stats.blocks_cached, stats.blocks_free) == (3, 0, 9)
    run.add("c", range(100, 140), 1)  # ten blocks: there is no room, and nothing to evict
    assert run.step().request_ids == ["b"]
    assert run.scheduler.stats().evicted_blocks == 0
    run.drain()
    assert run.finished == ["b", "c"]


def test_what_is_generated_is_cached_while_it_runs():
    run = engine()
    run.add("a", range(6), 20)
    for _ in range(8):
        run.step()
    prompt = run.tokens["a"][:12]
    run.add("b", [*prompt, 500], 1)
    step = run.step()
    assert (step.request_ids, step.counts) == (["a", "b"], [1, 1])
    assert run.scheduler.stats().hit_tokens == 12
    run.scheduler.check_invariants()


def test_what_follows_a_prompt_of_one_token_is_cached():
    run = engine()
    run.add("a", [1], 8)
    run.drain()
    assert run.scheduler.stats().blocks_cached == 2


def test_a_request_that_does_not_use_the_cache():
    run = engine()
    run.add("a", range(8), 5, use_cache=False)
    run.step()
    run.add("b", range(8), 5)
    run.add("c", range(8), 5, use_cache=False)
    assert run.step().counts == [1, 8, 8]
    run.drain()
    stats = run.scheduler.stats()
    assert (stats.hit_tokens, stats.blocks_cached) == (0, 3)  # those of b: 12 tokens


def test_a_reset_cache_is_found_by_nobody_and_runs_on():
    run = engine()
    run.add("old", range(50, 58), 1)
    run.drain()
    run.add("a", range(8), 9)
    run.step()
    assert run.scheduler.reset_cache() == 2
    run.scheduler.check_invariants()
    run.add("b", range(8), 2)
    assert run.step().counts == [1, 8]
    run.scheduler.check_invariants()
    run.drain()
    assert run.finished == ["old", "b", "a"]
    stats = run.scheduler.stats()
    assert (stats.blocks_live, stats.hit_tokens) == (0, 0)
    assert run.scheduler.tree.evict(16) == stats.blocks_cached
    assert run.scheduler.pool.num_free == 16


def test_cached_blocks_are_told_to_a_listener():
    events = []
    run = engine(on_event=events.append)
    run.add("a", range(8), 2)
    run.drain()
    assert [(event.kind, event.blocks) for event in events] == [("stored", (0, 1))]
