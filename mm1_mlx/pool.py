"""Answers for many callers at once: each waits its turn, and is as it would be alone.

One job on the model's thread decodes all answers under way and begins the next ones between
two of their tokens: picture by picture and part by part, with a token of theirs behind each,
and several short ones at a time. Meanwhile threads of the pool's own read the prompts and open
the pictures of those that come next. Callers may be threads or asyncio.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from types import TracebackType
from typing import Self, Unpack

from mm1_mlx.answer import Options, Piece, Settings
from mm1_mlx.batch import SIZE, Ask, Batch
from mm1_mlx.engine import Plan
from mm1_mlx.errors import BusyError, MemoryLimitError
from mm1_mlx.image import ImageSource
from mm1_mlx.messages import Message
from mm1_mlx.prefill import Cancelled
from mm1_mlx.runtime import Runtime, wired
from mm1_mlx.ticket import Listener, Ticket

# Questions that wait while as many as there are places are answered.
MAX_WAITING = 64
# Of them as many are made ready at a time, and held with their pictures' pixels.
AHEAD = 2
# Seconds for which those under way may stand still while others begin, so that many that
# come at once are soon decoded together; one that takes longer is begun all the same.
STILL = 1.0


class Pool:
    """Answers for many callers at once; a context manager.

    Questions are answered in the order in which they came, but that one may pass another
    while that one's pictures are being opened. One that has not the memory beside those
    under way waits until some have ended, and those behind it wait with it. What else is
    asked of the runtime waits until nobody asks the pool.

    Args:
        runtime: from ``load``; it stays open when the pool is closed.
        size: how many answers are under way at once.
        max_waiting: how many questions may wait.
    """

    def __init__(
        self, runtime: Runtime, *, size: int = SIZE, max_waiting: int = MAX_WAITING
    ) -> None:
        self.size = size
        self.max_waiting = max_waiting
        self._runtime = runtime
        self._readers = ThreadPoolExecutor(AHEAD, thread_name_prefix="mm1-read")
        # Guards what follows; told when a plan is ready.
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._working = False
        self._closed = False
        self._idle = threading.Event()
        self._idle.set()
        # Used on the model's thread alone: answers under way, by their numbers in a batch,
        # and when each began.
        self._rows: dict[int, tuple[Ticket, int, float]] = {}
        self._next_row = 0
        # As many were under way when the next one had not the memory beside them.
        self._full: int | None = None
        # Seconds that an answer took of late.
        self._pace = 1.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def waiting(self) -> int:
        """How many questions wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many answers are under way."""
        return len(self._rows)

    def submit(self, ask: Ask, listen: Listener, *, count: int = 1) -> Ticket:
        """Put a question.

        Args:
            ask: the question.
            listen: called on one of the pool's threads, and to return at once, with every
                piece of an answer or the error that ends all of them; answer number i of
                ``count`` is drawn with the seed + i.
            count: how many answers to it are wanted.

        Raises:
            BusyError: too many questions wait.
            RuntimeError: the pool is closed.
        """
        if not 1 <= count <= self.size:
            raise ValueError(f"count is {count}, expected 1 to {self.size}")
        ticket = Ticket(ask, count, listen, self._withdraw)
        with self._changed:
            if self._closed:
                raise RuntimeError("the pool is closed")
            free = max(0, self.size - len(self._rows))
            if len(self._waiting) >= self.max_waiting + free:
                turns = len(self._waiting) / self.size
                raise BusyError(
                    f"{len(self._waiting)} questions wait already; ask again later",
                    seconds=self._pace * turns,
                )
            self._waiting.append(ticket)
            self._read_ahead()
            if not self._working:
                try:
                    self._runtime._worker.submit(self._work)
                except RuntimeError:
                    self._waiting.remove(ticket)
                    raise
                self._working = True
                self._idle.clear()
            self._changed.notify_all()
        return ticket

    def stream(
        self,
        prompt: str | Sequence[Message],
        images: Sequence[ImageSource] = (),
        **options: Unpack[Options],
    ) -> Iterator[Piece]:
        """The pieces of an answer as they come, for a thread; as ``runtime.stream``."""
        came: SimpleQueue[Piece | BaseException] = SimpleQueue()
        ask = Ask(prompt, images, Settings(**options))
        ticket = self.submit(ask, lambda _, piece: came.put(piece))

        def pieces() -> Iterator[Piece]:
            try:
                while True:
                    piece = _checked(came.get())
                    yield piece
                    if piece.finish_reason is not None:
                        return
            finally:
                ticket.cancel()

        return pieces()

    async def astream(
        self,
        prompt: str | Sequence[Message],
        images: Sequence[ImageSource] = (),
        **options: Unpack[Options],
    ) -> AsyncIterator[Piece]:
        """The pieces of an answer as they come, for asyncio; as ``runtime.stream``."""
        ask = Ask(prompt, images, Settings(**options))
        async with aclosing(self.answers(ask)) as answers:
            async for _, piece in answers:
                yield piece

    async def answers(
        self, *asks: Ask, count: int = 1
    ) -> AsyncGenerator[tuple[int, Piece]]:
        """The pieces of ``count`` answers to every question, each with its number.

        Raises:
            BusyError: too many questions wait.
            MM1Error: a question cannot be answered.
        """
        came: asyncio.Queue[tuple[int, Piece | BaseException]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def listen(first: int, number: int, piece: Piece | BaseException) -> None:
            loop.call_soon_threadsafe(came.put_nowait, (first + number, piece))

        tickets: list[Ticket] = []
        try:
            for i, ask in enumerate(asks):
                tickets.append(
                    self.submit(ask, partial(listen, i * count), count=count)
                )
            left = count * len(asks)
            while left:
                number, held = await came.get()
                piece = _checked(held)
                left -= piece.finish_reason is not None
                yield number, piece
        finally:
            for ticket in tickets:
                ticket.cancel()

    def close(self) -> None:
        """Take no more questions; those that wait are answered first."""
        with self._changed:
            self._closed = True
        self._idle.wait()
        self._readers.shutdown()

    def _withdraw(self, ticket: Ticket) -> None:
        with self._changed:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                if ticket.plan is not None:
                    ticket.plan.cancel()
                self._read_ahead()
            self._changed.notify_all()

    def _read_ahead(self) -> None:
        """Make the first of those that wait ready; with ``_changed`` held."""
        for ticket, _ in zip(self._waiting, range(AHEAD), strict=False):
            if ticket.plan is None:
                ticket.plan = self._readers.submit(self._plan, ticket)
                ticket.plan.add_done_callback(self._tell_ready)

    def _plan(self, ticket: Ticket) -> Plan:
        return ticket.ask.plan(self._runtime.engine)

    def _tell_ready(self, _: Future[Plan]) -> None:
        with self._changed:
            self._changed.notify_all()

    def _work(self) -> None:
        """Answer until nobody waits; on the model's thread."""
        engine = self._runtime.engine
        batch = Batch(engine)
        try:
            with engine.lock, wired():
                while self._goes_on(batch):
                    self._turn(batch)
        except BaseException as error:
            with self._changed:
                self._working = False
                tickets = [*self._waiting]
                self._waiting.clear()
                self._idle.set()
            self._tell_all(error, tickets)
            raise
        finally:
            batch.close()

    def _tell_all(self, error: BaseException, tickets: Sequence[Ticket] = ()) -> None:
        """End all answers under way, and what waits behind their questions."""
        for ticket in [*(ticket for ticket, _, _ in self._rows.values()), *tickets]:
            ticket.tell(0, error)
            ticket.gone.set()
        self._rows.clear()

    def _goes_on(self, batch: Batch) -> bool:
        """Whether there is anything to do; if not, the job is over."""
        with self._changed:
            self._call_off()
            while self._waiting and not len(batch) and not self._first_ready():
                self._changed.wait()
                self._call_off()
            self._working = bool(len(batch) or self._waiting)
            if not self._working:
                self._idle.set()
            return self._working

    def _call_off(self) -> None:
        """Let those leave the queue whose callers want no more."""
        for ticket in [ticket for ticket in self._waiting if ticket.unwanted]:
            self._leave(ticket)
            ticket.call_off()

    def _leave(self, ticket: Ticket) -> None:
        if ticket in self._waiting:
            self._waiting.remove(ticket)
        self._read_ahead()

    def _first_ready(self) -> Ticket | None:
        return next((ticket for ticket in self._waiting if ticket.ready), None)

    def _turn(self, batch: Batch) -> None:
        """Begin answers, while there are places and time, and a token of every other."""
        since = time.perf_counter()
        while len(batch) < (self.size if self._full is None else self._full):
            self._full = None
            with self._changed:
                ticket = self._first_ready()
            if ticket is None:
                break
            self._begin(batch, ticket)
            if time.perf_counter() - since > STILL:
                break
        self._step(batch)

    def _step(self, batch: Batch) -> None:
        """A token of every answer under way."""
        try:
            for row, came in batch.step():
                self._tell(row, came)
        # No fault of a caller's: all whose answers are under way are told.
        except Exception as error:
            batch.close()
            self._tell_all(error)

    def _meanwhile(self, batch: Batch, ticket: Ticket) -> None:
        """``_step`` while a question is read, which ends where its caller has left."""
        self._step(batch)
        if ticket.unwanted:
            raise Cancelled

    def _begin(self, batch: Batch, ticket: Ticket) -> None:
        """Begin the next answer to a question."""
        assert ticket.plan is not None
        number, row, began = ticket.begun, self._next_row, time.perf_counter()
        try:
            plan = _with_seed(ticket.plan.result(), number)
            pieces = batch.begin(
                row,
                plan,
                ticket.start,
                gone=ticket.gone,
                again=number + 1 < ticket.count,
                between=partial(self._meanwhile, batch, ticket) if len(batch) else None,
            )
        except MemoryLimitError as error:
            if len(batch):
                # It may fit once another answer has ended.
                self._full = len(batch)
            else:
                self._refuse(ticket, error)
        except Cancelled:
            with self._changed:
                self._leave(ticket)
            ticket.call_off()
        # Whatever else it is, it is this question's own.
        except Exception as error:
            self._refuse(ticket, error)
        else:
            ticket.begun, self._next_row = number + 1, row + 1
            self._rows[row] = ticket, number, began
            if ticket.begun == ticket.count:
                # Its pictures' pixels go with it.
                ticket.plan = None
                with self._changed:
                    self._leave(ticket)
            for piece in pieces:
                self._tell(row, piece)

    def _refuse(self, ticket: Ticket, error: Exception) -> None:
        ticket.tell(ticket.begun, error)
        ticket.gone.set()
        with self._changed:
            self._leave(ticket)

    def _tell(self, row: int, came: Piece | BaseException) -> None:
        ticket, number, began = self._rows[row]
        if isinstance(came, BaseException) or came.finish_reason is not None:
            del self._rows[row]
            self._pace += 0.2 * (time.perf_counter() - began - self._pace)
        ticket.tell(number, came)


def _checked(came: Piece | BaseException) -> Piece:
    if isinstance(came, BaseException):
        raise came
    return came


def _with_seed(plan: Plan, number: int) -> Plan:
    """The question as its answer number ``number`` draws."""
    seed = plan.settings.seed
    if seed is None or not number:
        return plan
    return replace(plan, settings=replace(plan.settings, seed=(seed + number) % 2**64))
