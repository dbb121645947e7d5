"""Calls run on the worker's thread, one after another, or are refused."""

import asyncio
import contextlib
import threading

import pytest

from mm1_mlx.worker import Worker


def test_calls_run_in_order_on_one_other_thread():
    worker, seen = Worker(), []
    for i in range(5):
        worker.submit(lambda i=i: seen.append((i, threading.get_ident())))
    worker.close()
    assert [i for i, _ in seen] == list(range(5))
    assert {thread for _, thread in seen}.isdisjoint({threading.get_ident()})
    assert len({thread for _, thread in seen}) == 1


def test_what_a_call_raises_reaches_its_caller_and_the_worker_goes_on():
    worker = Worker()
    with pytest.raises(ZeroDivisionError):
        worker.submit(lambda: 1 // 0).result()
    assert worker.submit(lambda: 1).result() == 1
    worker.close()


def test_a_call_that_nobody_waits_for_is_not_run_and_the_worker_goes_on():
    worker, going, seen = Worker(), threading.Event(), []
    worker.submit(going.wait)
    left = worker.submit(seen.append, 1)
    assert left.cancel()
    going.set()
    assert worker.submit(lambda: 2).result(timeout=5) == 2
    assert seen == []
    assert worker.alive
    worker.close()


def test_an_asyncio_caller_that_leaves_does_not_end_the_worker():
    worker = Worker()
    going = threading.Event()

    async def leave():
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await asyncio.wrap_future(worker.submit(going.wait))

    asyncio.run(leave())
    going.set()
    assert worker.submit(lambda: 2).result(timeout=5) == 2
    worker.close()


def test_a_call_made_while_the_worker_closes_is_run_or_refused():
    for _ in range(20):
        worker, accepted = Worker(), []
        start = threading.Barrier(4)

        def call(worker=worker, accepted=accepted, start=start):
            start.wait()
            with contextlib.suppress(RuntimeError):
                while True:
                    accepted.append(worker.submit(int))

        threads = [threading.Thread(target=call) for _ in range(3)]
        for thread in threads:
            thread.start()
        start.wait()
        worker.close()
        for thread in threads:
            thread.join()
        assert [future.result(timeout=5) for future in accepted] == [0] * len(accepted)


def test_a_worker_may_close_itself():
    worker = Worker()
    worker.submit(worker.close).result(timeout=5)
    with pytest.raises(RuntimeError, match="the runtime is closed"):
        worker.submit(int)


def test_a_worker_does_not_wait_for_itself():
    worker = Worker()

    def inner():
        return worker.submit(lambda: 1).result()

    with pytest.raises(RuntimeError, match="would wait for itself"):
        worker.submit(inner).result()
    worker.close()


def test_a_listener_who_leaves_is_noticed_before_the_next_item():
    worker = Worker()
    seen, left = threading.Event(), []

    def make(gone):
        yield 1
        # A long step: a prompt that is read.
        seen.set()
        left.append(gone.wait(5))
        yield 2

    items = worker.iterate(make)
    assert next(items) == 1
    assert seen.wait(5)
    items.close()
    worker.submit(int).result(timeout=5)
    assert left == [True]
    worker.close()
