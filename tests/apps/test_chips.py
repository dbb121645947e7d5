"""``mm1 inspect --chips``: what each Mac can do with a model."""

import json

import pytest
from typer.testing import CliRunner

from mm1_mlx.apps.cli import app
from mm1_mlx.budget import usual_bytes, weight_bytes
from mm1_mlx.checkpoint import load_config
from mm1_mlx.chips import CHIPS
from mm1_mlx.limits import decode_rate, first_token_seconds
from mm1_mlx.presets import PRESETS
from mm1_mlx.quantize import find_recipe, parse_way, quantize
from mm1_mlx.recipe import LAYERS, plan
from mm1_mlx.resolution import with_resolution
from mm1_mlx.runtime import TINY

M1_MAX, M4_PRO = (
    next(chip for chip in CHIPS if chip.name == name) for name in ("M1 Max", "M4 Pro")
)


def inspect(*arguments):
    result = CliRunner().invoke(app, ["inspect", *arguments, "--chips"])
    assert result.exit_code == 0, result.output
    return result.stdout


# On the M1 Max with 4, 8 and 16 bits, and seconds to the first token.
RATES = ["32", "227/166", "58%", "32", "123/102", "72%", "32", "65/59", "78%"]
SECONDS = ["0.21/0.32", "3.48"]


def rows_of(text, chip):
    name = f"{chip.name} ({chip.gpu_cores})"
    return [
        line.split(")")[1].lstrip("*").split()
        for line in text.splitlines()
        if line.strip().startswith(name)
    ]


def test_a_row_for_every_mac_fits_100_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = inspect("mm1-3b")
    for chip in CHIPS:
        (row,) = rows_of(text, chip)
        assert len(row) == 11
    assert rows_of(text, M1_MAX) == [[*RATES, *SECONDS]]


def test_on_a_narrow_terminal_the_first_token_has_a_table_of_its_own(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = inspect("mm1-3b")
    assert rows_of(text, M1_MAX) == [RATES, SECONDS]
    # Nothing was cut.
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_first_tokens_are_given_as_limits_and_as_others_reach_them(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    facts = json.loads(inspect("mm1-7b", "--json"))
    prompt = facts["prompt"]
    assert prompt["high_resolution"] == {"tokens": 5 * 144 + 56, "tiles": 5}
    assert prompt["share"] == 0.65
    config = PRESETS["mm1-7b"]
    ways = plan(find_recipe("4bit"), config).packed
    sharp = with_resolution(config, "2x672")
    four = {(x["chip"], x["gpu_cores"]): x["bits"]["4"] for x in facts["chips"]}[
        "M4 Pro", 20
    ]
    least = first_token_seconds(M4_PRO, config, 200, 1, ways)
    assert four["first_token_seconds"] == least
    assert four["first_token_seconds_at_share"] == least / 0.65
    tiled = first_token_seconds(M4_PRO, sharp, 776, 5, ways)
    assert four["high_resolution_seconds_at_share"] == tiled / 0.65
    # By hand 0.41, 0.64 and 5.0, for a decoder of 7 billion that runs all of its layers
    # for all positions.
    (row,) = rows_of(inspect("mm1-7b"), M4_PRO)
    assert row[-2:] == ["0.38/0.59", "4.84"]


def test_what_rests_on_projections_is_marked(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = inspect("mm1-3b")
    for chip in CHIPS:
        (row,) = rows_of(text, chip)
        assert [cell.endswith("*") for cell in row[-2:]] == [chip.projected] * 2
    (line,) = [x for x in text.splitlines() if "M5 Ultra" in x]
    # Not sold: from which memory on nobody knows.
    assert line.split()[2:5] == ["(80)*", "?", "681/497"]


def test_where_it_does_not_fit_there_is_no_first_token(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    rows = [line.split() for line in inspect("mm1-30b").splitlines()]
    (row,) = [row for row in rows if row[:2] == ["M1", "(8)"]]
    assert row[2:] == ["no"] * 5
    (row,) = [row for row in rows if row[:3] == ["M1", "Max", "(32)"]]
    assert row[-2:] == ["1.22/1.88", "9.59"]


def test_a_packed_model_is_shown_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    recipe = find_recipe("4bit")
    three = recipe.with_ways(dict.fromkeys(LAYERS, parse_way("3", "bits")))
    quantize(TINY, tmp_path / "out", three, measured=False)
    text = inspect(str(tmp_path / "out"))
    assert "3 bits" in text
    assert "8 bits" not in text
    facts = json.loads(inspect(str(tmp_path / "out"), "--json"))
    config, ways = load_config(TINY), plan(three, load_config(TINY)).packed
    assert facts["needs"] == {
        "3": sum(weight_bytes(config, ways).values()) + usual_bytes(config)
    }
    m1 = facts["chips"][0]["bits"]["3"]
    assert m1["fits"] == [8, 16]
    assert m1["decode_share"] is None
    assert m1["tokens_per_second"]["0"] == decode_rate(CHIPS[0], config, ways)
    # What its files hold, not what others would.
    (size,) = facts["bytes"].items()
    file = tmp_path / "out/model.safetensors"
    assert size == ("3-bit", file.stat().st_size)


@pytest.mark.parametrize("model", ["mm1-3b", "mm1-7b-moe"])
def test_the_weights_are_those_that_the_recipes_make(model):
    facts, config = json.loads(inspect(model, "--json")), PRESETS[model]
    for name, recipe in (("8-bit", "8bit"), ("4-bit", "4bit")):
        ways = plan(find_recipe(recipe), config).packed
        assert facts["bytes"][name] == sum(weight_bytes(config, ways).values())
    room = facts["needs"]["4"] - facts["bytes"]["4-bit"]
    assert room == facts["needs"]["16"] - facts["bytes"]["float16"] > 0


def test_json_has_what_the_table_has():
    facts = json.loads(inspect("mm1-30b", "--json"))
    prompt = facts["prompt"]
    assert (prompt["tokens"], prompt["tiles"], prompt["context"]) == (200, 1, 2048)
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
