"""A question that waits its turn, or whose answers are under way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from mm1_mlx.answer import Piece, Stats, Timings
from mm1_mlx.batch import Ask
from mm1_mlx.engine import Plan

# Which answer to a question it belongs to, and what came.
Listener = Callable[[int, Piece | BaseException], None]


@dataclass(eq=False)
class Ticket:
    """A question that was put to a pool."""

    ask: Ask
    count: int
    _listen: Listener
    _withdraw: Callable[[Ticket], None]
    start: float = field(default_factory=time.perf_counter)
    gone: threading.Event = field(default_factory=threading.Event)
    plan: Future[Plan] | None = None
    # How many of its answers have begun.
    begun: int = 0

    def cancel(self) -> None:
        """Want no more of it: it leaves the queue, or its answers end where they are."""
        self.gone.set()
        self._withdraw(self)

    def tell(self, number: int, came: Piece | BaseException) -> None:
        """Hand over what came; a listener that fails is not told again."""
        if self.gone.is_set():
            return
        try:
            self._listen(number, came)
        # Whatever it is, it is the listener's own, and the others' answers go on.
        except Exception:
            self.gone.set()

    def call_off(self) -> None:
        """Tell that the answers which have not begun never will."""
        waited = time.perf_counter() - self.start
        stats = Stats(0, 0, 0, 0, Timings(0.0, 0.0, waited, waited, 0.0))
        for number in range(self.begun, self.count):
            self.tell(number, Piece("", None, "cancelled", stats))

    @property
    def unwanted(self) -> bool:
        """Whether its caller has left or called it off."""
        cancel = self.ask.settings.cancel
        return self.gone.is_set() or (cancel is not None and cancel.is_set())

    @property
    def ready(self) -> bool:
        """Whether its prompt is made, or cannot be."""
        return self.plan is not None and self.plan.done()
