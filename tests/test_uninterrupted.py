"""A Ctrl-C that comes while bookkeeping changes is raised after it."""

import contextlib
import signal
import threading

import pytest
from interrupts import interrupted

from pagedkv import BlockPool, BlockTable
from pagedkv.host import block_pool
from pagedkv.host.interrupts import Uninterrupted


def test_it_is_raised_at_the_end():
    done = []

    def change():
        with Uninterrupted():
            with Uninterrupted():
                signal.raise_signal(signal.SIGINT)
                done.append("inner")
            done.append("outer")
        done.append("never")

    with pytest.raises(KeyboardInterrupt):
        change()
    assert done == ["inner", "outer"]
    with Uninterrupted():
        pass  # nothing is left of it
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_of_the_body_is_the_interrupts_context():
    def fail():
        with Uninterrupted():
            signal.raise_signal(signal.SIGINT)
            raise KeyError("body")

    with pytest.raises(KeyboardInterrupt) as raised:
        fail()
    assert isinstance(raised.value.__context__, KeyError)


def test_a_handler_that_the_body_sets_stays():
    before = signal.getsignal(signal.SIGINT)
    seen = []
    try:
        with Uninterrupted():
            signal.signal(signal.SIGINT, lambda *arguments: seen.append(arguments))
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(seen) == 1


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Uninterrupted():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_hold_nothing_back():
    found = []

    def run():
        with Uninterrupted():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


def start():
    pool = BlockPool(12, (None, 4))
    tables = [BlockTable(pool, 2) for _ in range(2)]
    tables[0].append(7)
    tables.append(tables[0].fork())
    return pool, tables


OPERATIONS = {
    "allocate": lambda pool, tables: pool.allocate(3),
    "free": lambda pool, tables: tables[0].free(),
    "fork": lambda pool, tables: tables[2].fork(),
    "append": lambda pool, tables: tables[1].append(5),
}


def broken(name):
    """Interrupts of an operation after which blocks are lost, or held by too few."""
    count = 0
    for (pool, tables), _ in interrupted(start, lambda state: OPERATIONS[name](*state)):
        held = {block for table in tables for ids in table.blocks for block in ids if block >= 0}
        try:
            pool.check_invariants()
            assert pool.num_free == 12 - len(held)
        except AssertionError:
            count += 1
    return count


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_interrupt_loses_a_block(name):
    assert broken(name) <= (name == "allocate")  # the caller never got its blocks


@pytest.mark.parametrize("name", ["free", "append"])
def test_without_it_interrupts_do(name, monkeypatch):
    monkeypatch.setattr(block_pool, "Uninterrupted", contextlib.nullcontext)
    assert broken(name) > 0
