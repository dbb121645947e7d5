"""``mm1 serve`` as the child of another program."""

import json
import os
import signal
import subprocess
import sys

import httpx
import pytest

import mm1_mlx

MM1 = [
    sys.executable,
    "-m",
    "mm1_mlx.apps",
    "serve",
    "--port",
    "0",
    "--exit-with-stdin",
]
# On a busy machine, in seconds.
LONG = 300


def launch(command, stdin, **options):
    return subprocess.Popen(
        command,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_it_says_where_it_serves_and_ends_with_its_stdin():
    process = launch([*MM1, "--json"], subprocess.PIPE)
    try:
        served = json.loads(process.stdout.readline())
        assert served.keys() == {"url", "model", "version"}
        assert served["version"] == mm1_mlx.__version__
        health = httpx.get(f"{served['url']}/health", timeout=LONG).json()
        assert (health["status"], health["model"]) == ("ok", served["model"])
        # What is written there is no end.
        process.stdin.write("a line\n" * 10_000)
        process.stdin.flush()
        assert httpx.get(f"{served['url']}/health", timeout=LONG).status_code == 200
        process.stdin.close()
        assert process.wait(LONG) == 0
        assert process.stdout.read() == ""
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, None])
def test_it_ends_where_its_parent_blocks_signals(how):
    """As the threads do from which apps start their children; a mask is inherited."""

    def block():
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})

    process = launch([*MM1, "--json"], subprocess.PIPE, preexec_fn=block)
    try:
        json.loads(process.stdout.readline())
        if how is None:
            process.stdin.close()
        else:
            process.send_signal(how)
        assert process.wait(LONG) == 0
    finally:
        process.kill()


def test_a_parent_that_is_killed_takes_it_along():
    """The pipe's only writer is a process that gets no chance to clear up."""
    reading, writing = os.pipe()
    keeper = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(3600)"], pass_fds=[writing]
    )
    os.close(writing)
    process = launch([*MM1, "--json"], reading)
    os.close(reading)
    try:
        json.loads(process.stdout.readline())
        assert process.poll() is None
        keeper.kill()
        keeper.wait()
        assert process.wait(LONG) == 0
    finally:
        keeper.kill()
        process.kill()


@pytest.mark.parametrize("stdin", ["closed", "empty"])
def test_without_a_parent_it_ends_before_it_serves(stdin):
    command = ["sh", "-c", 'exec "$@" <&-', "sh", *MM1] if stdin == "closed" else MM1
    process = launch(command, subprocess.DEVNULL)
    try:
        assert process.wait(LONG) == 128 + signal.SIGTERM
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
