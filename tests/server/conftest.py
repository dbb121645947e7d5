"""A server of the embedded model that the tests share."""

import sys
from pathlib import Path

import pytest

# As tests import each other's helpers elsewhere: there are no packages of tests.
sys.path.insert(0, str(Path(__file__).parent))

from serving import serving


@pytest.fixture(scope="package")
def server():
    with serving() as running:
        yield running
