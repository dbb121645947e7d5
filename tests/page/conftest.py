import sys
from pathlib import Path

import pytest
from playwright import sync_api

sys.path.insert(0, str(Path(__file__).parent))

from browser_needed import browser_path
from driver import Driver
from stub import Stub, running

# Milliseconds.
PATIENCE = 30_000


@pytest.fixture(scope="module")
def chromium():
    """Closed behind every module: what drives it leaves an event loop running till then."""
    path = browser_path()
    # Far more than a quiet machine takes.
    sync_api.expect.set_options(timeout=PATIENCE)
    with sync_api.sync_playwright() as playwright:
        # Root needs the flag; the pages are ours.
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served():
    with running(Stub()) as stub:
        yield stub


@pytest.fixture
def stub(served):
    served.clear()
    return served


@pytest.fixture
def context(chromium):
    with chromium.new_context(viewport={"width": 1100, "height": 760}) as context:
        yield context


@pytest.fixture
def page(context, stub):
    """The page, opened; what it says on the console that nobody expected fails the test."""
    driver = Driver(context.new_page(), stub.url)
    yield driver
    assert driver.complaints == []
