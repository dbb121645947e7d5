"""A server that belongs to another program ends when that one does."""

from __future__ import annotations

import os
import signal
import threading

CHUNK = 4096


def end_with(stream: int) -> None:
    """End this process as SIGTERM does once nobody can write to the stream any more.

    The kernel closes a pipe behind a program that crashed or was killed, too. What is read
    from it is thrown away.

    Args:
        stream: the file descriptor of the pipe's reading end.
    """

    def watch() -> None:
        # Not sys.stdin: its lock, held here, would abort the interpreter's end.
        try:
            while os.read(stream, CHUNK):
                pass
        except OSError:
            # It was closed before this process began.
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="mm1-parent", daemon=True).start()
