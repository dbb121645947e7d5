"""One run in several processes of this machine, without ``mlx.launch``.

That keeps a core busy for as long as they run: its loop asks whether their input could be
written to, which is always so, and never sleeps.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

# What tells a process which one of the ring it is.
RANK = "MLX_RANK"
# The others end within seconds behind the first.
SECONDS_BEHIND = 60


def run_ring(command: Sequence[str], size: int) -> int:
    """Run a command in ``size`` processes that average their gradients; 0 if all end well.

    Else the exit status of one that failed, a signal before any other: who was killed leaves
    the others failing.
    """
    with TemporaryDirectory() as folder:
        hosts = Path(folder) / "hosts.json"
        addresses = [[f"127.0.0.1:{port}"] for port in free_ports(size)]
        hosts.write_text(json.dumps(addresses))
        ring = [
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                env=os.environ | {"MLX_HOSTFILE": str(hosts), RANK: str(rank)},
            )
            for rank in range(size)
        ]
        try:
            # One that fails leaves the others waiting for its gradients.
            while all(process.poll() is None for process in ring):
                time.sleep(0.1)
            if not any(process.poll() for process in ring):
                for process in ring:
                    process.wait(timeout=SECONDS_BEHIND)
            return min(filter(None, [process.poll() for process in ring]), default=0)
        finally:
            for process in ring:
                process.kill()
                process.wait()


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nothing listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
