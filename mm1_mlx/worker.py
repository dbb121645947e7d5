"""A thread of its own for mlx, whose streams belong to the thread that uses them."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, ParamSpec, TypeVar

import mlx.core as mx

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
Job = Callable[[], None]


class Worker:
    """Runs calls one after another on its thread.

    Not a ``ThreadPoolExecutor``: a thread that used mlx has to give its streams back
    before it ends, or the process now and then aborts at its exit.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        # A job put behind the end of the queue would wait for ever.
        self._lock = threading.Lock()
        thread = threading.Thread(
            target=_run, args=(self._jobs,), name="mm1", daemon=True
        )
        thread.start()
        self._thread = thread
        # Also called when the worker is forgotten, and at the interpreter's exit.
        self._end = weakref.finalize(self, _close, self._jobs, self._lock, thread)

    @property
    def alive(self) -> bool:
        """Whether its thread takes calls."""
        return self._thread.is_alive()

    def submit(
        self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs
    ) -> Future[R]:
        """The future result of ``call(*args, **kwargs)``.

        Raises:
            RuntimeError: the worker is closed.
        """
        future: Future[R] = Future()

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                return  # Its caller, asyncio's most often, waits no more.
            try:
                future.set_result(call(*args, **kwargs))
            except BaseException as error:
                # Whatever it is, it belongs to the caller who waits for the result.
                future.set_exception(error)

        if threading.current_thread() is self._thread:
            raise RuntimeError("the runtime's own thread would wait for itself")
        with self._lock:
            if not self._end.alive:
                raise RuntimeError("the runtime is closed")
            self._jobs.put(job)
        return future

    def iterate(self, make: Callable[[threading.Event], Iterator[T]]) -> Iterator[T]:
        """What an iterator made on the thread gives, handed over as it comes.

        A caller that stops listening ends it, and sets the event that ``make`` is given.

        Raises:
            RuntimeError: the worker is closed.
        """
        items: SimpleQueue[tuple[T] | None] = SimpleQueue()
        abandoned = threading.Event()
        job = self.submit(_hand_over, make, items.put, abandoned)
        try:
            while (held := items.get()) is not None:
                yield held[0]
            job.result()
        finally:
            abandoned.set()

    async def aiterate(
        self, make: Callable[[threading.Event], Iterator[T]]
    ) -> AsyncGenerator[T]:
        """As ``iterate``, for asyncio."""
        items: asyncio.Queue[tuple[T] | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        abandoned = threading.Event()

        def give(item: tuple[T] | None) -> None:
            # A loop that has ended listens no more.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(items.put_nowait, item)

        job = self.submit(_hand_over, make, give, abandoned)
        try:
            while (held := await items.get()) is not None:
                yield held[0]
            await asyncio.wrap_future(job)
        finally:
            abandoned.set()

    def close(self) -> bool:
        """Take no more calls; whether those that wait have been run.

        They will be, where the worker closes itself.
        """
        self._end()
        if threading.current_thread() is self._thread:
            return False
        # Another thread may have been first to close it.
        self._thread.join()
        return True


def _hand_over(
    make: Callable[[threading.Event], Iterator[T]],
    give: Callable[[tuple[T] | None], None],
    abandoned: threading.Event,
) -> None:
    """Give what an iterator gives, each in a tuple, and None behind it."""
    try:
        if abandoned.is_set():  # while other jobs were under way
            return
        made = make(abandoned)
        try:
            for item in made:
                give((item,))
                if abandoned.is_set():
                    break
        finally:
            if isinstance(made, Generator):
                made.close()
    finally:
        give(None)


def _run(jobs: SimpleQueue[Job | None]) -> None:
    while (job := jobs.get()) is not None:
        job()
        # A finished job holds its arguments and result.
        del job
    mx.clear_streams()


def _close(
    jobs: SimpleQueue[Job | None], lock: threading.Lock, thread: threading.Thread
) -> Any:
    """End the thread after the calls that wait."""
    with lock:
        jobs.put(None)
    if thread is not threading.current_thread():
        thread.join()
