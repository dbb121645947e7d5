"""``mm1 serve`` under load, and how fast it is beside its peers' servers.

    python -m benchmarks.serving load  OUT.json [--minutes 5] [--clients 16]
    python -m benchmarks.serving speed OUT.json [--rounds 5] [--mlx-lm PYTHON] [--mlx-vlm PYTHON]

A PYTHON is that of an environment with the peer. Ends with status 1, and says why, where an
answer is wrong or a goal is missed; the figures are written all the same.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from mm1_mlx.blas import preload_blas

BLAS = preload_blas()

from benchmarks.peers.machine import machine  # noqa: E402
from benchmarks.peers.rows import table  # noqa: E402
from benchmarks.serving import load, speed  # noqa: E402
from benchmarks.serving.servers import FaultError  # noqa: E402

CLIENTS, MINUTES, REQUESTS, ROUNDS = 16, 5.0, 96, 5


def main() -> None:
    """Measure what is asked for, write it, and say what is not as it should be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["load", "speed"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--mlx-lm", metavar="PYTHON")
    parser.add_argument("--mlx-vlm", metavar="PYTHON")
    options = parser.parse_args()
    named = {"mlx_lm": options.mlx_lm, "mlx_vlm": options.mlx_vlm}
    peers = {name: python for name, python in named.items() if python}
    here = machine({"mm1": sys.executable, **peers}) | {"blas": BLAS}
    try:
        if options.what == "load":
            figures = load.measure(options.minutes, options.clients, options.requests)
            faults = load.missed(figures)
        else:
            figures = speed.measure(options.rounds, peers)
            faults = speed.missed(figures)
    except FaultError as fault:
        sys.exit(f"error: {fault}")
    held = json.loads(options.out.read_text()) if options.out.exists() else {}
    held |= {options.what: {"machine": here, **figures}}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(held, indent=1) + "\n")
    if options.what == "speed":
        print(table(figures["rows"]))
    else:
        print(json.dumps(figures, indent=1))
    if faults:
        sys.exit("\n".join(["missed:", *faults]))


if __name__ == "__main__":
    main()
