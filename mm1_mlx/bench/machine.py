"""What a measurement depends on: the machine, its system, the versions, the commit."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mm1_mlx.device import gpu_cores, printed

PACKAGES = ("mm1-mlx", "mlx", "mlx-lm")
ROOT = Path(__file__).parents[2]


def describe(blas: str | None = None) -> dict[str, Any]:
    """What a measurement depends on, as JSON values.

    Args:
        blas: the library under mlx's CPU backend, None for its own.
    """
    on_gpu = mx.default_device() != mx.cpu
    chip = str(mx.device_info().get("device_name") or platform.machine())
    mac = platform.mac_ver()[0]
    return {
        "chip": chip,
        "device": "GPU" if on_gpu else "CPU",
        "gpu_cores": gpu_cores() if on_gpu else None,
        "cpu_cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"macOS {mac}"
        if mac
        else f"{platform.system()} {platform.release()}",
        "versions": {name: version(name) for name in PACKAGES},
        "commit": commit(),
        "blas": None if on_gpu else blas or "of mlx",
    }


def commit(root: Path = ROOT) -> str | None:
    """The commit of the checkout that runs, with -dirty where files were changed since.

    None where the package was installed.
    """
    if not (root / ".git").exists():
        return None
    head = printed("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")
    if not head:
        return None
    status = ("status", "--porcelain", "--untracked-files=no")
    changed = printed("git", "-C", str(root), *status)
    return head.strip() + ("-dirty" if changed else "")
