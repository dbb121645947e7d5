"""``mm1 inspect --chips``: what each Mac can do with a model."""

import json

import pytest
from typer.testing import CliRunner

from mm1_mlx.apps.cli import app
from mm1_mlx.chips import CHIPS


def inspect(*arguments):
    result = CliRunner().invoke(app, ["inspect", *arguments, "--chips"])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_row_for_every_mac_fits_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = inspect("mm1-3b").splitlines()
    for chip in CHIPS:
        (row,) = [x for x in lines if f" {chip.name} ({chip.gpu_cores}) " in f" {x}"]
        assert " s" in row
    (row,) = [line for line in lines if line.strip().startswith("M1 Max")]
    assert row.split() == [
        "M1", "Max", "(32)", "32", "227/166", "58%", "32", "123/102", "72%", "32",
        "65/59", "78%", "0.21", "s",
    ]  # fmt: skip


def test_json_has_what_the_table_has():
    facts = json.loads(inspect("mm1-30b", "--json"))
    assert facts["prompt"] == {"tokens": 200, "tiles": 1, "context": 2048}
    macs = {(mac["chip"], mac["gpu_cores"]): mac for mac in facts["chips"]}
    four = macs["M1", 8]["bits"]["4"]
    assert four["fits"] == []
    four = macs["M4 Max", 40]["bits"]["4"]
    assert four["fits"] == [48, 64, 128]
    assert four["tokens_per_second"]["0"] == pytest.approx(32, rel=0.02)
    assert macs["M4 Max", 40]["bits"]["16"]["fits"] == [128]
    assert facts["needs"]["4"] == pytest.approx(21e9, rel=0.05)


@pytest.mark.parametrize(
    ("model", "memory"),
    # The smallest that a 4-bit model runs on. By hand: 8; 16, with eight times the keys
    # and values that the preset's 7B has; 32, tight; 48 on the edge.
    [("mm1-3b", 8), ("mm1-7b", 8), ("mm1-30b", 32), ("mm1-3b-moe", 48)],
)
def test_the_smallest_mac_is_the_known_one(model, memory):
    macs = json.loads(inspect(model, "--json"))["chips"]
    assert min(x for mac in macs for x in mac["bits"]["4"]["fits"]) == memory


def test_experts_have_their_own_share():
    macs = json.loads(inspect("mm1-7b-moe", "--json"))["chips"]
    assert {mac["bits"]["4"]["decode_share"] for mac in macs} == {0.39}
    assert {mac["bits"]["16"]["decode_share"] for mac in macs} == {None}


def test_an_encoder_alone_has_no_tokens_to_predict(tmp_path, make_config):
    from mm1_mlx.models import MM1
    from mm1_mlx.writer import CheckpointWriter

    config = make_config(connector=None, decoder=None, prompt=None)
    with CheckpointWriter(tmp_path / "encoder", config, {}) as writer:
        for name, tensor in MM1(config).tensors().items():
            writer.add(name, tensor)
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "encoder"), "--chips"])
    assert "has no decoder" in str(result.exception)
