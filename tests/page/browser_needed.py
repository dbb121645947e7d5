"""A browser and node, without which the page's tests are skipped; under CI they fail."""

import os
import shutil
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "apps/page"
MODULES = PAGE / "node_modules"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def browser_path():
    """A Chromium of the machine's own."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    return found or _stop("needs Chromium (apt install chromium)")


def need_modules():
    """What package-lock.json names, in ``node_modules``."""
    if shutil.which("node") is None:
        _stop("needs node (apt install nodejs npm)")
    # npm writes it behind everything else.
    if not (MODULES / ".package-lock.json").is_file():
        _stop("needs the page's packages (make page)")
    return MODULES


def _stop(reason):
    required = sys.platform == "linux" and os.environ.get("CI")
    (pytest.fail if required else pytest.skip)(reason)
