"""What interrupts or listeners that raise leave of a scheduler."""

import contextlib

import pytest
from engine import engine
from interrupts import interrupted

BUDGET = {"num_blocks": 9, "windows": (None,)}
GROUPS = {"num_blocks": 20, "windows": (None, 3)}


def busy():
    """Prompts in chunks, decodes, a fork, a request that waits for a prefix, little room."""
    run = engine(**BUDGET, block_size=2, max_tokens=6, max_running=4)
    run.add("a", [1, 2, 3], 4)
    run.add("b", [1, 2, 3, 4, 5, 6], 3)
    run.step()
    run.step()
    run.scheduler.fork("a", "fork", 9)
    run.tokens["fork"], run.limits["fork"] = [*run.tokens["a"][:-1], 9], run.limits["a"]
    run.namespaces["fork"] = None
    run.add("c", [1, 2, 3, 4, 5, 6, 7], 2)
    run.add("d", [1, 2, 3, 4, 5, 6, 8], 2)
    run.add("e", [40, 41, 42, 43, 44], 2)
    return run


def scheduled():
    run = busy()
    run.schedule = run.scheduler.schedule()
    run.sampled = run.compute(run.schedule)
    return run


def ahead():
    """As `scheduled`, and one more step in flight."""
    run = scheduled()
    run.ahead = run.scheduler.schedule()
    assert run.ahead.unknown
    run.compute(run.ahead)
    return run


def update(run):
    # An interrupt on the way out comes when all is done.
    if run.schedule in run.scheduler.in_flight:
        run.scheduler.update(run.sampled)
    for request, token in run.sampled.items():
        run.tokens[request].append(token)
        if len(run.tokens[request]) == run.limits[request]:
            run.finished.append(request)


def schedule(run):
    if not run.scheduler.in_flight:
        run.scheduler.schedule()
    [run.schedule] = run.scheduler.in_flight


def schedule_ahead(run):
    if len(run.scheduler.in_flight) < 2:
        run.scheduler.schedule()
    run.compute(run.scheduler.in_flight[1])


def retract(run):
    for step in run.scheduler.in_flight[::-1]:
        if step in run.scheduler.in_flight:
            run.scheduler.retract()


def add(run):
    with contextlib.suppress(ValueError):
        run.scheduler.add("f", [60, 61, 62], 1)
    run.tokens["f"], run.limits["f"], run.namespaces["f"] = [60, 61, 62], 4, None


def end(call):
    def once(run):
        with contextlib.suppress(ValueError):
            call(run)
        run.finished.append("a")

    return once


OPERATIONS = {
    "schedule": (busy, schedule),
    "update": (scheduled, update),
    "retract": (scheduled, retract),
    "add": (busy, add),
    "abort": (busy, end(lambda run: run.scheduler.abort("a"))),
    "abort what is computed": (scheduled, end(lambda run: run.scheduler.abort("a"))),
    "finish": (busy, end(lambda run: run.scheduler.finish("a"))),
    "reset_cache": (busy, lambda run: run.scheduler.reset_cache()),
    "schedule ahead": (scheduled, schedule_ahead),
    "update, one ahead": (ahead, update),
    "retract both": (ahead, retract),
    "abort what is ahead": (ahead, end(lambda run: run.scheduler.abort("a"))),
    "finish what is ahead": (ahead, end(lambda run: run.scheduler.finish("a"))),
}


@pytest.mark.parametrize("budget", [BUDGET, GROUPS], ids=["one group", "two groups"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_what_was_interrupted_is_called_again(name, budget, monkeypatch):
    """It is done or not, and nothing is lost."""
    for key, value in budget.items():
        monkeypatch.setitem(BUDGET, key, value)
    start, operation = OPERATIONS[name]
    for run, done in interrupted(start, operation):
        if not done:
            operation(run)
        if name == "schedule":
            run.compute(run.schedule)
        for step in run.scheduler.in_flight:
            sampled = run.results[step]
            run.update({key: sampled[key] for key in sampled if key not in run.finished})
        run.drain()
        everybody = ["a", "b", "c", "d", "e", *(["f"] if name == "add" else []), "fork"]
        assert sorted(run.finished) == everybody
        scheduler = run.scheduler
        scheduler.pool.check_invariants()
        scheduler.tree.check_invariants()
        stats = scheduler.stats()
        assert (stats.waiting, stats.running) == (0, 0)
        assert (scheduler.pool.refs > 0).sum() == scheduler.tree.num_blocks


class RefusedError(Exception):
    pass


def test_events_after_one_that_a_listener_refused_come_with_the_next_method():
    run, told = engine(num_blocks=30, block_size=2), []
    run.add("a", [1, 2, 3, 4], 3)
    run.add("b", [5, 6, 7, 8], 3)

    def listener(event):
        told.append(event.blocks)
        if len(told) == 1:
            raise RefusedError

    run.schedule = run.scheduler.schedule()
    run.sampled = run.compute(run.schedule)
    run.scheduler.on_event = listener
    with pytest.raises(RefusedError):
        run.scheduler.update(run.sampled)
    assert (len(told), run.scheduler.tree.num_blocks) == (1, 4)
    run.scheduler.finish("a")
    assert sorted(map(len, told)) == [2, 2]


@pytest.mark.parametrize("count", range(1, 5))
@pytest.mark.parametrize("retract", [False, True])
@pytest.mark.parametrize("most", [1, 2])
def test_a_listener_that_raises_loses_nothing(count, retract, most):
    """Also while one step is ahead of the other."""
    run = busy()
    left = count

    def listener(event):
        nonlocal left
        left -= 1
        if not left:
            raise RefusedError

    run.scheduler.on_event = listener
    for _ in range(300):
        in_flight = run.scheduler.in_flight
        if len(in_flight) < most:
            try:
                step = run.scheduler.schedule()
            except RefusedError:
                continue
            if step.request_ids:
                run.compute(step)
                if retract:
                    run.scheduler.retract()
                    retract = False
                continue
            if not in_flight:
                break
        run.schedule, run.sampled = in_flight[0], run.results[in_flight[0]]
        try:
            update(run)
        except RefusedError:
            update(run)  # it was done
    assert left < 1
    run.scheduler.check_invariants()
    assert sorted(run.finished) == ["a", "b", "c", "d", "e", "fork"]
    assert run.scheduler.stats().blocks_live == 0
