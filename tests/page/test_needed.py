"""A machine that checks every change cannot pass by skipping."""

import shutil
import sys

import browser_needed
import pytest


@pytest.mark.parametrize(
    ("need", "reason"),
    [
        (browser_needed.browser_path, "needs Chromium"),
        (browser_needed.need_modules, "needs node"),
    ],
)
def test_what_cannot_run_fails_under_ci(need, reason, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    for platform, ci, outcome in [
        ("linux", "1", pytest.fail.Exception),
        ("linux", "", pytest.skip.Exception),
        ("darwin", "1", pytest.skip.Exception),
    ]:
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.setenv("CI", ci)
        with pytest.raises(outcome, match=reason):
            need()
