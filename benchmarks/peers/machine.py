"""What figures belong to: the machine, each environment's versions, and the code itself."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Where the checkout keeps what is installed as the package, and below it.
PACKAGE = {"": "mm1_mlx", "apps": "apps", "convert": "convert"}
VERSIONS = """
import json
from importlib.metadata import PackageNotFoundError, version
found = {}
for name in ("mm1-mlx", "mlx", "mlx-lm", "mlx-vlm", "transformers", "torch"):
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""
INSTALLED = """
import importlib.util
print(importlib.util.find_spec("mm1_mlx").submodule_search_locations[0])
"""


def machine(pythons: dict[str, str]) -> dict[str, Any]:
    """The machine, versions of each environment, and the commit that is installed."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {
            name: json.loads(_ask(python, VERSIONS)) for name, python in pythons.items()
        },
        "commit": commit(),
        "load_average": round(os.getloadavg()[0], 1),
        "date": time.strftime("%Y-%m-%d"),
    }


def commit() -> str:
    """The checkout's commit, marked where files were changed since."""
    short = _git("rev-parse", "--short=12", "HEAD")
    paths = [*PACKAGE.values(), "benchmarks/*.py", "pyproject.toml"]
    changed = _git("status", "--porcelain", "--untracked-files=no", *paths)
    return f"{short}-dirty" if changed else short


def check_installed(python: str) -> None:
    """Refuse an environment whose mm1_mlx is not the checkout's: its commit would lie.

    Raises:
        SystemExit: it holds other code.
    """
    installed = digest({"": Path(_ask(python, INSTALLED).strip())})
    if installed != digest({name: ROOT / path for name, path in PACKAGE.items()}):
        raise SystemExit(
            f"{python} has another mm1_mlx than this checkout; install it again: "
            f"{python} -m pip install --force-reinstall --no-deps ."
        )


def digest(folders: dict[str, Path]) -> str:
    """SHA-256 of the Python files of a package, wherever its folders lie."""
    found = {
        str(Path(name) / path.relative_to(folder)): path.read_bytes()
        for name, folder in folders.items()
        for path in folder.rglob("*.py")
    }
    total = hashlib.sha256()
    for name in sorted(found):
        total.update(f"{name}\0{len(found[name])}\0".encode() + found[name])
    return total.hexdigest()


def _ask(python: str, script: str) -> str:
    # Isolated: the checkout's own metadata is not the environment's.
    return subprocess.check_output([python, "-I", "-c", script], text=True)


def _git(*arguments: str) -> str:
    run = subprocess.run(
        ["git", *arguments], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return run.stdout.strip()


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
