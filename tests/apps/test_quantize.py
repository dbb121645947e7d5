"""``mm1 quantize``: a table, JSON, and one line where it cannot."""

import json
import re
import sys

import pytest

from mm1_mlx.apps.cli import main
from mm1_mlx.checkpoint import load_config
from mm1_mlx.config import Packing
from mm1_mlx.runtime import TINY


@pytest.fixture
def mm1(monkeypatch, capsys):
    """A function: run the command line; its exit status, stdout and stderr."""

    # A tenth of what users wait for.
    monkeypatch.setattr("mm1_mlx.quantize.job.QUESTIONS", 30)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mm1", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "100")
        try:
            main()
        except SystemExit as end:
            status = end.code or 0
        else:
            status = 0
        return status, *capsys.readouterr()

    return run


def test_it_shows_what_each_component_takes_and_what_it_costs(mm1, tmp_path):
    status, out, _ = mm1("quantize", TINY, tmp_path / "out", "--count", 8)
    assert status == 0
    assert out.strip().endswith(str(tmp_path / "out"))
    assert "connector" in out
    assert "kept" in out
    assert "nats in the mean" in out
    assert re.search(
        r"^accuracy on 30 questions about drawn shapes: (9\d.\d|100.0)% \(95% interval "
        r"\d\d.\d% to \d+.\d%\); unpacked (9\d.\d|100.0)% \(95%",
        out,
        re.MULTILINE,
    )
    assert load_config(tmp_path / "out").quantization.bits == 4


def test_json_holds_the_same(mm1, tmp_path):
    arguments = ["--count", "8", "--vision", "8/32", "--head", "mxfp8", "--json"]
    status, out, _ = mm1("quantize", TINY, tmp_path / "out", *arguments)
    facts = json.loads(out)
    assert status == 0
    assert facts["out"] == str(tmp_path / "out")
    parts = facts["components"]
    assert parts["connector"]["packed"] == {}
    assert parts["vision"]["packed"].keys() == {"8"}
    assert parts["head"]["packed"].keys() == {"mxfp8"}
    assert parts["connector"]["bytes_before"] == parts["connector"]["bytes_after"]
    assert 0 < facts["cost"]["kl_mean"] < facts["cost"]["kl_p99"]
    assert facts["cost_of_rounding"] is None
    assert facts["unmeasured"] is None
    for asked in (facts["accuracy"]["before"], facts["accuracy"]["after"]):
        low, high = asked["interval_95"]
        assert asked["questions"] == 30
        assert 0.8 < low < asked["share"] <= high
        assert asked["share"] == asked["right"] / 30
    ways = load_config(tmp_path / "out").quantization
    assert ways.way("decoder.embed_tokens") == Packing(
        group_size=32, bits=8, mode="mxfp8"
    )


def test_bits_and_group_are_those_of_the_layers(mm1, tmp_path):
    arguments = ["--bits", "3", "--group-size", "32", "--no-measure"]
    assert mm1("quantize", TINY, tmp_path / "out", *arguments)[0] == 0
    ways = load_config(tmp_path / "out").quantization
    path = "decoder.layers.0.mlp.up_proj"
    assert ways.way(path) == Packing(group_size=32, bits=3)
    # The head keeps the recipe's groups where they divide its width.
    group = 64 if load_config(TINY).decoder.hidden_size % 64 == 0 else 32
    assert ways.way("decoder.embed_tokens") == Packing(group_size=group, bits=6)


def test_learning_says_what_rounding_would_have_cost(mm1, tmp_path):
    arguments = ["--bits", "2", "--learned", "--count", "8", "--json"]
    status, out, _ = mm1("quantize", TINY, tmp_path / "out", *arguments)
    facts = json.loads(out)
    assert status == 0
    assert facts["cost"]["kl_mean"] < facts["cost_of_rounding"]["kl_mean"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--recipe 5bit", "error: recipe '5bit' is not one of ['4bit',"),
        (
            "--recipe 4bit --bits 3",
            "error: --recipe 4bit says what --bits says; give one",
        ),
        ("--bits 7", "error: --bits 7: bits: 7 is not one of [2, 3, 4, 5, 6, 8]"),
        ("--bits 0", "error: --bits 0: bits: 0 is not one of [2, 3, 4, 5, 6, 8]"),
        ("--mode int4", "error: --mode int4: mode 'int4' is not one of ['affine',"),
        ("--head some", "error: --head 'some' is not 'keep', bits such as '4'"),
        (
            "--calibration nowhere",
            "error: calibration 'nowhere' does not exist; give a",
        ),
        ("--mode mxfp4 --head keep --learned", "error: there are no scales to learn"),
    ],
)
def test_what_cannot_be_is_one_line(arguments, message, mm1, tmp_path):
    status, out, err = mm1("quantize", TINY, tmp_path / "out", *arguments.split())
    assert (status, out) == (1, "")
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_converting_packs(mm1, tmp_path):
    status, out, _ = mm1("convert", TINY, tmp_path / "out", "--bits", "8")
    assert (status, out.strip()) == (0, str(tmp_path / "out"))
    assert load_config(tmp_path / "out").quantization.bits == 8
    status, out, _ = mm1("convert", TINY, tmp_path / "plain")
    assert load_config(tmp_path / "plain").quantization is None


def test_where_memory_cannot_measure_it_packs_and_says_so(mm1, tmp_path, monkeypatch):
    monkeypatch.setattr("mm1_mlx.quantize.needs.allowed", lambda: 1_000_000)
    status, out, err = mm1("quantize", TINY, tmp_path / "out")
    assert status == 0
    assert "measuring needs" in err
    assert "1.0 MB are free here; nothing is measured" in " ".join(err.split())
    assert "nats" not in out
    assert load_config(tmp_path / "out").quantization.bits == 4
