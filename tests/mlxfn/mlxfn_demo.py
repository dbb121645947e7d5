"""The C++ program, built once into build/; without its tools it is skipped, in CI not."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "apps/macos/mlxfn-demo"
BUILD = ROOT / "build/mlxfn-demo"
# Debian's packages by a header or program of each.
PACKAGES = {
    "g++": "g++",
    "cmake": "cmake",
    "pkg-config": "pkg-config",
    "nlohmann/json.hpp": "nlohmann-json3-dev",
    "jpeglib.h": "libjpeg-dev",
    "png.h": "libpng-dev",
    "libexif/exif-data.h": "libexif-dev",
    "pcre2.h": "libpcre2-dev",
    "utf8proc.h": "libutf8proc-dev",
    "openssl/evp.h": "libssl-dev",
}


@cache
def demo():
    """The program's path."""
    if sys.platform != "linux":
        _stop("is built here on Linux; on macOS see its README")
    missing = [package for name, package in PACKAGES.items() if not _is_there(name)]
    if missing:
        _stop(f"needs {' '.join(missing)} (apt install)")
    configure = (
        *("cmake", "-S", SOURCES, "-B", BUILD),
        f"-DPython_EXECUTABLE={sys.executable}",
        # Compiles in two thirds of the time.
        "-DCMAKE_CXX_FLAGS_RELEASE=-O1",
    )
    BUILD.mkdir(parents=True, exist_ok=True)
    # One at a time, where the tests are run by several processes.
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, ("cmake", "--build", BUILD, "-j2")):
            run = subprocess.run(command, capture_output=True, text=True)
            assert run.returncode == 0, run.stdout + run.stderr
    return BUILD / "mlxfn-demo"


def run_demo(*arguments):
    """Exit status, stdout and stderr of a run, whose environment has no Python."""
    run = subprocess.run(
        [demo(), *(os.fsencode(str(x)) for x in arguments)],
        capture_output=True,
        env={"PATH": "/nowhere"},
        timeout=120,
    )
    return run.returncode, run.stdout.decode(), run.stderr.decode()


def ask_demo(folder, question, picture=None, max_tokens=64):
    """What it answers with --json."""
    pictures = [] if picture is None else [picture]
    limit = ["--json", "--max-tokens", max_tokens]
    status, out, err = run_demo(*limit, folder, *pictures, question)
    assert (status, err) == (0, "")
    return json.loads(out)


def _is_there(name):
    if name.endswith((".h", ".hpp")):
        return Path("/usr/include", name).is_file() or any(
            Path("/usr/include").glob(f"*-linux-gnu/{name}")
        )
    return shutil.which(name) is not None


def _stop(reason):
    required = sys.platform == "linux" and os.environ.get("CI")
    (pytest.fail if required else pytest.skip)(f"the C++ program {reason}")
