"""A machine that checks every change cannot pass by skipping."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import needed


@pytest.mark.parametrize(
    ("need", "where", "reason"),
    [
        (needed.need_cpu_harness, "linux", "needs clang"),
        (needed.need_metal, "darwin", "needs a Mac's GPU"),
    ],
)
def test_what_cannot_run_fails_under_ci(need, where, reason, monkeypatch):
    monkeypatch.setattr(needed, "why_not", lambda: "needs clang")
    monkeypatch.setattr(needed.mx.metal, "is_available", lambda: False)
    for platform, ci, outcome in [
        (where, "1", pytest.fail.Exception),
        (where, "", pytest.skip.Exception),
        ("elsewhere", "1", pytest.skip.Exception),
    ]:
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.setenv("CI", ci)
        with pytest.raises(outcome, match=reason):
            need()
