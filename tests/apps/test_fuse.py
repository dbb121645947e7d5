"""``mm1 fuse``: one model of a model and adapters, what it costs, and when it refuses."""

import json
import re
import shutil
import sys

import mlx.core as mx
import pytest

from mm1_mlx import generate, load
from mm1_mlx.adapters import (
    Adapter,
    AdapterConfig,
    Adapters,
    attach,
    base_of,
    load_adapted,
    save,
)
from mm1_mlx.adapters.attach import wrapped
from mm1_mlx.apps.cli import main
from mm1_mlx.checkpoint import (
    load_config,
    load_model,
    packed_on_disk,
    read_manifest,
    verify_digests,
)
from mm1_mlx.errors import CheckpointError, ConfigError, MemoryLimitError
from mm1_mlx.fuse import fuse
from mm1_mlx.quantize import find_recipe, quantize
from mm1_mlx.runtime import TINY

TOKENS = [[5, 9, 44, 7, 130, 261, 12, 3]]
PICTURE = TINY / "four-shapes.png"
LAYER = "decoder.layers.0.self_attn.q_proj"
DECODER = load_config(TINY).decoder
WIDTH = DECODER.hidden_size
# What an adapter changes: four projections of attention and three of the MLP a layer.
CHANGED = 7 * DECODER.num_hidden_layers


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "packed"
    quantize(TINY, out, find_recipe("4bit"), measured=False)
    return out


@pytest.fixture(scope="module")
def layers(packed):
    """The decoder's packed layers; groups do not divide every width."""
    held = packed_on_disk(packed, load_config(packed))
    return [path for path in held if ".layers." in path]


def size_of(model):
    return sum(x.nbytes for x in mx.load(str(model / "model.safetensors")).values())


def make(out, strength, **fields):
    """An adapter of mm1-tiny whose second matrices are drawn, not learned."""
    model = load_model(TINY, mx.float32)
    model.freeze()
    attach(model, config := AdapterConfig(**fields))
    mx.random.seed(0)
    for layer in wrapped(model).values():
        layer.lora_b = mx.random.normal(layer.lora_b.shape, scale=strength)
        if "m" in layer:
            layer.m = layer.m * mx.random.uniform(0.9, 1.1, layer.m.shape)
    mx.eval(model.parameters())
    save(out, Adapter.of(model, config, base_of(TINY)))
    return out


@pytest.fixture(scope="module")
def strong(tmp_path_factory):
    """Moves predictions by tenths of a nat."""
    return make(tmp_path_factory.mktemp("adapters") / "strong", 0.1, rank=8)


@pytest.fixture(scope="module")
def weak(tmp_path_factory):
    """Moves predictions by less than 4 bits do."""
    return make(tmp_path_factory.mktemp("adapters") / "weak", 0.01, rank=8)


@pytest.fixture
def mm1(monkeypatch, capsys):
    """A function: run the command line; its exit status, stdout and stderr."""

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


def logits(model):
    return model(mx.array(TOKENS))


def relative(one, other):
    return (mx.abs(one - other).max() / mx.abs(other).max()).item()


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("base", ["plain", "packed"])
def test_fused_equals_unfused(base, kind, packed, tmp_path):
    path = packed if base == "packed" else TINY
    adapter = make(tmp_path / "adapter", 0.1, kind=kind)
    given = Adapters.load([adapter])
    fuse(path, tmp_path / "out", given, dtype=mx.float32, measured=False)
    unfused = load_adapted(path, given, mx.float32, beside=True)
    fused = load_model(tmp_path / "out", mx.float32)
    assert wrapped(unfused)
    assert not wrapped(fused)
    assert relative(logits(fused), logits(unfused)) <= 1e-5
    assert relative(logits(load_model(path, mx.float32)), logits(unfused)) > 1e-2
    with (
        load(path, mx.float32, adapters=[adapter]) as before,
        load(tmp_path / "out", mx.float32) as after,
    ):
        answers = [
            generate(x, "Describe the picture.", [PICTURE], max_tokens=24)
            for x in (before, after)
        ]
    assert answers[0].tokens == answers[1].tokens


def test_several_with_scales(strong, weak, tmp_path):
    given = Adapters.load([(strong, 0.5), (weak, -2.0)])
    fuse(TINY, tmp_path / "out", given, dtype=mx.float32, measured=False)
    unfused = load_adapted(TINY, given, mx.float32, beside=True)
    fused = load_model(tmp_path / "out", mx.float32)
    assert relative(logits(fused), logits(unfused)) <= 1e-5


def test_a_few_rows_at_a_time_make_the_same_file(packed, strong, tmp_path, monkeypatch):
    given = Adapters.load([strong])
    for i, path in enumerate((TINY, packed)):
        fuse(path, tmp_path / f"whole-{i}", given, measured=False)
        with monkeypatch.context() as patch:
            patch.setattr("mm1_mlx.pieces.PIECE_BYTES", 3000)
            fuse(path, tmp_path / f"pieces-{i}", given, measured=False)
        one, other = (
            load_model(tmp_path / f"{x}-{i}").tensors() for x in ("whole", "pieces")
        )
        # Products of fewer rows are summed in another order.
        assert all(mx.allclose(one[k], other[k], 1e-3, 1e-5) for k in one)


def test_weights_trained_in_full_are_taken_over(tmp_path):
    model = load_model(TINY, mx.float32)
    model.freeze()
    model.connector.unfreeze()
    attach(model, config := AdapterConfig(where=("decoder.attention",)))
    model.connector.update({"readout": [{"bias": mx.full(WIDTH, 0.25)}]})
    given = Adapters(((Adapter.of(model, config, base_of(TINY)), 1.0),))
    report = fuse(TINY, tmp_path / "out", given, measured=False)
    fused = load_model(tmp_path / "out").tensors()
    assert mx.array_equal(
        fused["connector.readout.0.bias"], mx.full(WIDTH, 0.25, mx.float16)
    )
    whole = sum(name.startswith("connector.") for name in fused)
    assert report.changed == whole + 4 * DECODER.num_hidden_layers


def test_what_it_changes_of_a_packed_model_is_kept_in_16_bits(packed, strong, tmp_path):
    report = fuse(packed, tmp_path / "out", Adapters.load([strong]), count=4)
    before, after = (packed_on_disk(p, load_config(p)) for p in (packed, report.out))
    assert set(report.unpacked) == {p for p in before if ".layers." in p}
    assert after == {p: way for p, way in before.items() if p not in report.unpacked}
    assert report.measured.lost < 1e-3
    assert report.before < report.after < size_of(TINY)
    old, new = (load_model(p).tensors() for p in (packed, report.out))
    assert new[f"{LAYER}.weight"].dtype == mx.float16
    same = [k for k in new if not k.startswith("decoder.layers.") or "norm" in k]
    assert all(mx.array_equal(old[k], new[k]) for k in same)
    assert "decoder.embed_tokens.scales" in same


def test_bits_that_round_an_adapter_away_are_refused_with_the_numbers(
    packed, weak, tmp_path
):
    given, out = Adapters.load([weak]), tmp_path / "out"
    for path in (TINY, packed):
        with pytest.raises(
            CheckpointError,
            match=r"^\d+\.\d% of what the adapters change would be lost, more than 10% "
            r"\(predictions move by [\d.e-]+ nats, and the fused model's are [\d.e-]+ "
            r"off\); leave out the bits, .*--calibration.*--allow-loss",
        ):
            fuse(path, out, given, recipe=find_recipe("4bit"), count=4)
    assert not list(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=", fuse the model that this was quant"):
        fuse(packed, out, given, recipe=find_recipe("4bit"), count=4)
    report = fuse(
        TINY, out, given, recipe=find_recipe("4bit"), count=4, allow_loss=True
    )
    assert report.measured.lost > 0.1
    assert load_config(out).quantization.bits == 4


def test_bits_that_keep_most_of_it_are_written(packed, strong, tmp_path):
    """As many bits as the base had, and what did not change keeps its own to the bit."""
    report = fuse(
        packed, tmp_path / "out", Adapters.load([strong]),
        recipe=find_recipe("8bit"), count=4,
    )  # fmt: skip
    assert report.measured.lost < 0.1
    ways = packed_on_disk(report.out, load_config(report.out))
    assert ways[LAYER].bits == 8
    assert ways["decoder.embed_tokens"].bits == 6
    old, new = (load_model(p).tensors() for p in (packed, report.out))
    assert mx.array_equal(
        old["decoder.embed_tokens.weight"], new["decoder.embed_tokens.weight"]
    )


def test_what_stays_packed_is_kept_in_every_precision(packed, tmp_path):
    adapter = make(tmp_path / "adapter", 0.1, kind="lora")
    fuse(
        packed, tmp_path / "out", Adapters.load([adapter]),
        dtype=mx.bfloat16, measured=False,
    )  # fmt: skip
    old, new = (
        mx.load(str(p / "model.safetensors")) for p in (packed, tmp_path / "out")
    )
    kept = [n for n in old if n.endswith((".scales", ".biases")) and n in new]
    assert kept
    for name in kept:
        assert old[name].dtype == new[name].dtype != mx.bfloat16
        assert mx.array_equal(old[name], new[name])
    norm = "decoder.norm.weight"
    assert new[norm].dtype == mx.bfloat16 != old[norm].dtype


def test_the_manifest_says_what_it_is_made_of(strong, tmp_path):
    fuse(TINY, tmp_path / "out", Adapters.load([(strong, 0.5)]), measured=False)
    verify_digests(tmp_path / "out")
    source = read_manifest(tmp_path / "out")["source"]
    assert source["name"] == "mm1-tiny"
    assert source["licence"] == "MIT"
    (entry,) = source["fused"]
    assert entry["digest"] == Adapters.load([strong]).given[0][0].digest
    assert (entry["adapter"], entry["scale"]) == ("strong", 0.5)
    assert entry["trained_on"] == entry["into"] == base_of(TINY).to_dict()
    again = fuse(
        tmp_path / "out", tmp_path / "twice", Adapters.load([strong]), measured=False
    )
    assert len(read_manifest(again.out)["source"]["fused"]) == 2


def test_a_part_that_was_trained_needs_training_no_longer(tmp_path):
    model = load_model(TINY, mx.float32)
    model.freeze()
    model.connector.unfreeze()
    attach(model, config := AdapterConfig(where=("decoder.attention",)))
    given = Adapters(((Adapter.of(model, config, base_of(TINY)), 1.0),))
    base = shutil.copytree(TINY, tmp_path / "base")
    manifest = read_manifest(base)
    manifest["source"]["needs_training"] = ["vision", "connector"]
    (base / "manifest.json").write_text(json.dumps(manifest))
    report = fuse(base, tmp_path / "out", given, measured=False)
    assert read_manifest(report.out)["source"]["needs_training"] == ["vision"]


@pytest.mark.parametrize("place", ["base", "base/out", "link", "link/new/out", "."])
def test_a_model_is_never_fused_onto_itself(place, weak, tmp_path):
    base = shutil.copytree(TINY, tmp_path / "models/base")
    (base.parent / "link").symlink_to(base)
    # A model around it, which may be overwritten but for what lies in it.
    for name in ("config.json", "manifest.json"):
        shutil.copy(base / name, base.parent)
    before = {path: path.read_bytes() for path in base.parent.rglob("*.*")}
    with pytest.raises(
        CheckpointError, match=r"is, holds or lies in '.*base', which it is to be made"
    ):
        fuse(
            base,
            base.parent / place,
            Adapters.load([weak]),
            measured=False,
            overwrite=True,
        )
    assert {path: path.read_bytes() for path in base.parent.rglob("*.*")} == before


@pytest.mark.parametrize("base", ["plain", "packed"])
def test_bits_whose_loss_nobody_knows_are_refused(
    base, packed, layers, weak, tmp_path, mm1
):
    """Not measured since that was asked for, or since there is no memory."""
    path = packed if base == "packed" else TINY
    arguments = ("fuse", path, tmp_path / "out", "--adapter", weak, "--bits", 2)
    status, out, err = mm1(*arguments, "--no-measure")
    assert (status, out) == (1, "")
    assert re.match(
        rf"error: how much of what the adapters change would be lost by packing "
        rf"{len(layers)} of their weights is not known: nothing is to be measured; leave out the bits, ",
        err,
    )
    assert not (tmp_path / "out").exists()
    status, _, err = mm1(*arguments, "--no-measure", "--allow-loss")
    assert status == 0


def test_without_memory_to_measure_bits_are_refused(
    packed, weak, tmp_path, monkeypatch
):
    def short(*_):
        raise MemoryLimitError("measuring needs 9 GB, 1 GB is free")

    monkeypatch.setattr("mm1_mlx.fuse.check_memory", short)
    given, out = Adapters.load([weak]), tmp_path / "out"
    with pytest.raises(
        CheckpointError, match="not known: measuring needs 9 GB, 1 GB is"
    ):
        fuse(packed, out, given, recipe=find_recipe("4bit"), count=4)
    assert not out.exists()
    # Kept in 16 bits they are not rounded away.
    report = fuse(packed, out, given, count=4)
    assert report.unmeasured == "measuring needs 9 GB, 1 GB is free"


@pytest.mark.parametrize(
    ("strength", "dtype"), [(1e-3, None), (1e-3, mx.bfloat16), (4e-3, mx.bfloat16)]
)
def test_rounding_to_16_bits_is_no_reason_to_refuse(strength, dtype, tmp_path):
    """What is as small as that has no share that is lost; of others it is but said."""
    given = Adapters.load([make(tmp_path / "adapter", strength, rank=8)])
    report = fuse(TINY, tmp_path / "out", given, dtype=dtype, count=4)
    cost, effect = report.measured.cost.kl_mean, report.measured.effect.kl_mean
    if strength == 1e-3:
        assert (report.measured.lost, 1e-7 < effect < 1e-5) == (None, True)
    else:
        assert report.measured.lost == min(1, cost / effect) > 0.1


@pytest.mark.parametrize("base", ["plain", "packed"])
def test_bits_are_refused_where_the_prompts_show_no_effect(
    base, packed, layers, tmp_path
):
    """What does nothing on the prompts asked may do all on its own."""
    path = packed if base == "packed" else TINY
    given = Adapters.load([make(tmp_path / "adapter", 1e-3, rank=8)])
    out, recipe = tmp_path / "out", find_recipe("4bit")
    with pytest.raises(
        CheckpointError,
        match=rf"by packing {len(layers)} of their weights is not known: on the prompts "
        r"asked they move predictions by but [\d.]+e-0[67] nats; measure by prompts of .*"
        r"\(--calibration\), leave out the bits, for 16, or pass --allow-loss$",
    ):
        fuse(path, out, given, recipe=recipe, count=4)
    assert not out.exists()
    report = fuse(path, out, given, recipe=recipe, count=4, allow_loss=True)
    assert report.measured.lost is None


def test_an_adapter_of_another_model_is_told(packed, weak, tmp_path, caplog):
    """Once, whether it is measured or not."""
    for i, measured in enumerate((False, True)):
        caplog.clear()
        given = Adapters.load([weak])
        fuse(packed, tmp_path / str(i), given, measured=measured, count=4)
        assert caplog.text.count("was trained on 'mm1-tiny' (") == 1


def test_an_adapter_counts_once(weak, tmp_path):
    copy = shutil.copytree(weak, tmp_path / "copy")
    with pytest.raises(CheckpointError, match=r"weak and .*copy are the same adapter"):
        Adapters.load([weak, (copy, 0.5)])
    one = Adapters.load([weak]).given[0]
    with pytest.raises(CheckpointError, match="are the same adapter; name it once"):
        Adapters((one, one))


def test_no_more_than_all_is_lost(tmp_path):
    adapter = make(tmp_path / "adapter", 4e-3, rank=8)
    given, recipe = Adapters.load([adapter]), find_recipe("4bit")
    with pytest.raises(CheckpointError, match=r"^100\.0% of what the adapters change"):
        fuse(TINY, tmp_path / "out", given, recipe=recipe, count=4)


def test_what_is_too_large_for_the_type_is_refused(tmp_path):
    adapter = make(tmp_path / "adapter", 0.1, scale=1e4, where=(LAYER,))
    given = Adapters.load([(adapter, 1e4)])
    with pytest.raises(CheckpointError, match="holds numbers too large for"):
        fuse(TINY, tmp_path / "out", given, measured=False)
    assert not (tmp_path / "out").exists()


def test_there_must_be_something_to_fuse(tmp_path, strong):
    with pytest.raises(ConfigError, match="nothing to fuse"):
        fuse(TINY, tmp_path / "out", Adapters(()))
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="already exists"):
        fuse(TINY, tmp_path / "there", Adapters.load([strong]))


def test_the_command_says_what_it_did(mm1, packed, layers, strong, tmp_path, caplog):
    arguments = ("--adapter", f"{strong}:0.75", "--count", 4)
    status, out, err = mm1("fuse", packed, tmp_path / "out", *arguments)
    assert (status, err) == (0, "")
    assert f"adapter '{strong}' was trained on 'mm1-tiny' (" in caplog.text
    before, after = (size_of(model) / 1e6 for model in (packed, tmp_path / "out"))
    assert out.startswith(
        f"{CHANGED} weights changed, {before:.1f} MB before and {after:.1f} MB after\n"
    )
    assert f"{len(layers)} of them were packed and no longer are" in out
    assert re.search(
        r"move predictions by [\d.e-]+ nats, fusing them by [\d.e-]+: 0\.0\d% is", out
    )
    assert out.endswith(f"{tmp_path / 'out'}\n")


def test_it_measures_by_the_rows_that_were_trained_on(mm1, strong, tmp_path):
    shutil.copy(PICTURE, tmp_path / "0.png")
    row = {"image": "0.png", "question": "What colour is it?", "answer": "red"}
    rows = tmp_path / "mine.jsonl"
    rows.write_text((json.dumps(row) + "\n") * 4)
    arguments = ("--adapter", strong, "--calibration", rows, "--json")
    status, out, _ = mm1("fuse", TINY, tmp_path / "out", *arguments)
    assert status == 0
    measured = json.loads(out)["measured"]
    assert measured["effect"]["kl_mean"] > 1e-5
    assert measured["lost"] < 0.01
    # Four times the same question, whose answer is two or three tokens.
    assert measured["cost"]["positions"] % 4 == 0


def test_json_holds_the_same(mm1, strong, tmp_path):
    arguments = ("--adapter", strong, "--count", 4, "--bits", 8, "--json")
    status, out, _ = mm1("fuse", TINY, tmp_path / "out", *arguments)
    assert status == 0
    facts = json.loads(out)
    assert facts["changed"] == CHANGED
    assert facts["bytes_after"] < facts["bytes_before"]
    measured = facts["measured"]
    assert 0 < measured["lost"] < 0.1
    assert measured["lost"] == pytest.approx(
        measured["cost"]["kl_mean"] / measured["effect"]["kl_mean"]
    )
    assert 0 < measured["mean_difference"] < measured["largest_difference"]


def test_a_loss_is_one_line(mm1, weak, tmp_path):
    arguments = ("--adapter", weak, "--count", 4, "--bits", 2)
    status, out, err = mm1("fuse", TINY, tmp_path / "out", *arguments)
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_an_adapter_must_be_named(mm1, tmp_path):
    assert mm1("fuse", TINY, tmp_path / "out")[0] == 2
