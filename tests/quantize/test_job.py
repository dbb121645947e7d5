"""``quantize``: what it writes, what that costs, and what it refuses."""

import json
import re
import shutil
from math import prod
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mm1_mlx import pieces, writer
from mm1_mlx.checkpoint import (
    load_config,
    load_manifest,
    load_model,
    verify_digests,
)
from mm1_mlx.errors import CheckpointError, ConfigError, PromptError
from mm1_mlx.models.linear import named_leaves
from mm1_mlx.pieces import TensorInfo
from mm1_mlx.quantize import RECIPES, Recipe, find_recipe, parse_way, quantize
from mm1_mlx.quantize.cost import measure
from mm1_mlx.quantize.pack import LEAVES
from mm1_mlx.recipe import LAYERS, plan
from mm1_mlx.runtime import generate, load
from mm1_mlx.shard import write_shard

PICTURE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)


def uniform(word):
    way = parse_way(word, "test")
    return Recipe(dict.fromkeys((*LAYERS, "head"), way), name=word)


def tensors_of(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= mx.load(str(path))
    return found


def rounded(tensors, packed):
    """The tensors with those weights as mlx packs them."""
    expected = {}
    for name, tensor in tensors.items():
        path = name.removesuffix(".weight")
        if path in packed:
            parts = mx.quantize(tensor, **packed[path].to_dict())
            leaves = zip(LEAVES, parts, strict=False)
            expected |= {f"{path}.{leaf}": x for leaf, x in leaves}
        else:
            expected[name] = tensor
    return expected


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_every_recipe_writes_what_mlx_rounds(name, kind, request, tmp_path):
    source = request.getfixturevalue(kind)
    recipe = find_recipe(name)
    report = quantize(source, tmp_path / "out", recipe, measured=False)
    packed = plan(recipe, load_config(source)).packed
    expected = rounded(tensors_of(source), packed)
    written = tensors_of(tmp_path / "out")
    assert set(written) == set(expected)
    assert all(mx.array_equal(written[name], expected[name]) for name in expected)
    assert verify_digests(tmp_path / "out") >= 3
    # Loaded bit by bit, and each module packed in its own way.
    model = load_model(tmp_path / "out")
    tensors = model.tensors()
    assert all(mx.array_equal(tensors[name], expected[name]) for name in expected)
    ways = load_config(tmp_path / "out").quantization
    assert {path: ways.way(path) for path in packed} == packed
    before, after = (
        sum(x.nbytes for x in found.values()) for found in (tensors_of(source), written)
    )
    rows = report.rows.values()
    assert (sum(r.before for r in rows), sum(r.after for r in rows)) == (before, after)
    assert report.cost is None


def test_half_precision_stays_where_nothing_is_packed(write_model, tmp_path):
    source = write_model(tmp_path / "half", mx.float16)
    quantize(source, tmp_path / "out", find_recipe("4bit"), measured=False)
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    kept = set(before) & set(after) - {n for n in after if after[n].dtype == mx.uint32}
    assert {name.partition(".")[0] for name in kept} == {
        "vision",
        "connector",
        "decoder",
    }
    assert all(mx.array_equal(before[name], after[name]) for name in kept)
    floats = {x.dtype for x in after.values()} - {mx.uint32}
    assert floats == {mx.float16}


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_more_bits_cost_less(kind, request, tmp_path):
    source = request.getfixturevalue(kind)
    costs = {}
    for word in ("8", "4", "2"):
        recipe = uniform(word)
        report = quantize(source, tmp_path / word, recipe, count=8)
        costs[word] = report.cost
    assert 0 < costs["8"].kl_mean < costs["4"].kl_mean < costs["2"].kl_mean
    assert costs["8"].kl_mean <= costs["8"].kl_p99
    assert costs["8"].top1 >= costs["2"].top1
    assert costs["8"].positions == costs["2"].positions > 8


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("name", ["4bit", "mixed_3_6", "mxfp4", "mxfp8", "nvfp4"])
def test_packed_models_answer(kind, name, request, tmp_path):
    source = request.getfixturevalue(kind)
    quantize(source, tmp_path / "out", find_recipe(name), measured=False)
    with load(tmp_path / "out") as runtime:
        picture = Image.fromarray(PICTURE)
        first = generate(runtime, "What is this?", [picture], max_tokens=8)
        again = generate(runtime, "What is this?", [picture], max_tokens=8)
    assert len(first.tokens) == 8
    assert first.tokens == again.tokens


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_without_memory_to_spare_weights_stay_packed(
    kind, request, tmp_path, monkeypatch, assert_close
):
    source = request.getfixturevalue(kind)
    quantize(source, tmp_path / "out", find_recipe("4bit"), measured=False)
    kept = load_model(tmp_path / "out")
    # Enough for the model, and a tenth of it too little for its weights unpacked.
    monkeypatch.setattr("mm1_mlx.checkpoint.unswapped", lambda: 1000)
    packed = load_model(tmp_path / "out")
    for model, keeps in ((kept, True), (packed, False)):
        layers = [x for _, x in named_leaves(model) if "scales" in x]
        assert {"_unpacked" in x for x in layers} == {keeps}
    tokens = mx.array([[5, 9, 30, 2, 17, 40]])
    assert_close(packed(tokens), kept(tokens))
    cache, other = packed.make_cache(), kept.make_cache()
    for token in tokens[0].tolist():
        step = mx.array([[token]])
        assert_close(packed(step, cache), kept(step, other))


def test_the_manifest_says_what_was_done(dense, tmp_path):
    recipe = find_recipe("4bit")
    quantize(dense, tmp_path / "out", recipe, measured=False)
    source = load_manifest(tmp_path / "out")["source"]
    assert source == {
        "format": "test",
        "quantized": {"recipe": "4bit", "learned": False, "calibration": None},
    }
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (
        dense / "tokenizer.json"
    ).read_bytes()


def test_parity_of_other_weights_is_not_taken_over(write_model, tmp_path):
    source = write_model(tmp_path / "in")
    manifest = json.loads((source / "manifest.json").read_text())
    (source / "parity.json").write_text("{}")
    manifest["files"]["parity.json"] = {"bytes": 2, "sha256": ""}
    manifest["source"]["parity_checked"] = True
    (source / "manifest.json").write_text(json.dumps(manifest))
    quantize(source, tmp_path / "out", find_recipe("4bit"), measured=False)
    assert "parity_checked" not in load_manifest(tmp_path / "out")["source"]
    assert not (tmp_path / "out/parity.json").exists()


def test_what_is_packed_already_is_refused(dense, tmp_path):
    quantize(dense, tmp_path / "out", find_recipe("8bit"), measured=False)
    with pytest.raises(
        CheckpointError, match="out is packed already, 8-bit; quantize t"
    ):
        quantize(tmp_path / "out", tmp_path / "again", find_recipe("4bit"))
    with pytest.raises(CheckpointError, match="already exists; choose another name or"):
        quantize(dense, tmp_path / "out", find_recipe("4bit"))
    quantize(
        dense, tmp_path / "out", find_recipe("4bit"), measured=False, overwrite=True
    )
    assert load_config(tmp_path / "out").quantization.bits == 4


def test_a_model_is_never_packed_onto_itself(dense, tmp_path):
    base = shutil.copytree(dense, tmp_path / "base")
    before = {path: path.read_bytes() for path in base.iterdir()}
    for out in (base, base / "packed"):
        with pytest.raises(CheckpointError, match=r"is, holds or lies in '.*base'"):
            quantize(base, out, find_recipe("4bit"), measured=False, overwrite=True)
    assert {path: path.read_bytes() for path in base.iterdir()} == before


def test_a_run_that_ends_early_leaves_nothing(dense, tmp_path):
    def stop(task, done, total):
        if task == "writing" and done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(
            dense, tmp_path / "out", find_recipe("4bit"), measured=False, progress=stop
        )
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_stopped_goes_on(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "MAX_SHARD_BYTES", 100_000)
    recipe, out, names = find_recipe("4bit"), tmp_path / "out", []

    def stop(_, done, total):
        if done == total // 2:
            raise KeyboardInterrupt

    def noted(path, *rest):
        names.append(path.name)
        return write_shard(path, *rest)

    with pytest.raises(KeyboardInterrupt):
        quantize(dense, out, recipe, measured=False, progress=stop)
    monkeypatch.setattr(writer, "write_shard", noted)
    quantize(dense, out, recipe, measured=False)
    rest = list(names)
    quantize(dense, tmp_path / "whole", recipe, measured=False)
    assert 0 < len(rest) < len(names) - len(rest)
    for path in (tmp_path / "whole").iterdir():
        assert (out / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("learned", [False, True])
def test_no_room_is_said_before_a_prompt_is_asked(
    learned, dense, tmp_path, monkeypatch
):
    room = SimpleNamespace(free=1000)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: room)
    said = []
    with pytest.raises(CheckpointError, match=r"but its disk has 0\.0 MB free"):
        quantize(
            dense,
            tmp_path / "out",
            find_recipe("4bit"),
            learned=learned,
            progress=lambda *call: said.append(call),
        )
    assert said == []
    assert not list(tmp_path.iterdir())


def test_no_more_is_read_at_a_time_than_a_piece_needs(dense, tmp_path, monkeypatch):
    """Not even where a shard is larger."""
    read, sizes = TensorInfo.read, []

    def noted(info, rows=pieces.ALL):
        sizes.append((read(info, rows).nbytes, info.shape))
        return read(info, rows)

    quantize(dense, tmp_path / "a", find_recipe("4bit"), measured=False)
    monkeypatch.setattr(TensorInfo, "read", noted)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 2000)
    quantize(dense, tmp_path / "b", find_recipe("4bit"), measured=False)
    # A row may be larger.
    assert all(size <= max(2000, 4 * prod(shape[1:])) for size, shape in sizes)
    a, b = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert all(mx.array_equal(a[name], b[name]) for name in a)


def test_a_config_that_names_modules_that_are_not_packed_is_refused(dense, tmp_path):
    quantize(dense, tmp_path / "out", find_recipe("mixed_3_6"), measured=False)
    path = tmp_path / "out/config.json"
    text = path.read_text().replace("layers.7.mlp.down", "layers.9.mlp.down")
    path.write_text(text)
    with pytest.raises(
        CheckpointError, match=r"says how \['decoder.layers.9.mlp.down_pr"
    ):
        load_model(tmp_path / "out")


def test_learned_scales_predict_better_than_rounded_ones(dense, tmp_path):
    recipe = uniform("3")
    report = quantize(dense, tmp_path / "out", recipe, learned=True, count=16, epochs=3)
    assert report.cost.kl_mean < 0.95 * report.rounded.kl_mean
    plain = quantize(dense, tmp_path / "plain", recipe, count=16)
    assert plain.cost.kl_mean == pytest.approx(report.rounded.kl_mean, rel=1e-4)
    learned, rounded = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "plain")
    for name, tensor in rounded.items():
        moved = name.endswith((".scales", ".biases")) and "decoder." in name
        if not moved:
            # The integers, and all that is not packed.
            assert mx.array_equal(learned[name], tensor)
    assert load_manifest(tmp_path / "out")["source"]["quantized"]["learned"] is True


def test_scales_that_help_nothing_are_not_kept(dense, tmp_path):
    # So close already that a step of learning leads away.
    recipe = uniform("8")
    report = quantize(dense, tmp_path / "out", recipe, learned=True, count=8, epochs=1)
    quantize(dense, tmp_path / "plain", recipe, measured=False)
    assert not report.learned
    assert report.cost.kl_mean == pytest.approx(report.rounded.kl_mean, rel=1e-3)
    assert load_manifest(tmp_path / "out")["source"]["quantized"]["learned"] is False
    ours, plain = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "plain")
    assert all(mx.array_equal(ours[name], plain[name]) for name in plain)


def test_prompts_of_the_user_are_learned_from(dense, tmp_path):
    for i in range(4):
        Image.fromarray(PICTURE + np.uint8(i)).save(tmp_path / f"{i}.png")
    lines = [
        {"prompt": f"And {i}?", "images": [f"{i}.png"] * (1 + i % 2)} for i in range(4)
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    report = quantize(
        dense, tmp_path / "out", uniform("2"), learned=True, calibration=path, epochs=2
    )
    # A quarter of four measures.
    assert 0 < report.cost.positions <= 16
    done = load_manifest(tmp_path / "out")["source"]["quantized"]
    assert done["calibration"] == "mine.jsonl"


@pytest.mark.parametrize("word", ["mxfp4", "mxfp8"])
def test_what_has_no_scales_to_learn_is_refused(word, dense, tmp_path):
    with pytest.raises(
        ConfigError, match="no scales to learn: learning needs a decoder"
    ):
        quantize(dense, tmp_path / "out", uniform(word), learned=True)


def test_experts_learn_too(sparse, tmp_path):
    report = quantize(
        sparse, tmp_path / "out", uniform("2"), learned=True, count=8, epochs=2
    )
    assert report.cost.kl_mean < report.rounded.kl_mean
    quantize(sparse, tmp_path / "plain", uniform("2"), measured=False)
    learned, rounded = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "plain")
    name = "decoder.layers.1.mlp.switch_mlp.down_proj.scales"
    assert not mx.array_equal(learned[name], rounded[name])


@pytest.mark.parametrize("count", [-1, 0, 3])
def test_too_few_prompts_are_refused_before_anything_is_written(count, dense, tmp_path):
    with pytest.raises(PromptError, match=r"example\(s\) are too few"):
        quantize(dense, tmp_path / "out", find_recipe("4bit"), count=count)
    assert not list(tmp_path.iterdir())


def test_without_the_memory_to_measure_it_is_packed_all_the_same(
    dense, tmp_path, monkeypatch
):
    """A machine too small for the unpacked model is who needs a packed one."""
    for module in ("quantize.needs", "budget"):
        monkeypatch.setattr(f"mm1_mlx.{module}.allowed", lambda: 100_000)
    report = quantize(dense, tmp_path / "out", find_recipe("4bit"), count=8)
    assert report.cost is None
    assert re.match(
        r"measuring needs .* weights \+ .* logits of 2 answers \+ .* of memory, but "
        r"100.0 kB are free here; nothing is measured$",
        report.unmeasured,
    )
    monkeypatch.undo()
    assert load_config(tmp_path / "out").quantization.bits == 4
    assert quantize(dense, tmp_path / "more", find_recipe("4bit")).unmeasured is None


def test_what_memory_cannot_learn_is_refused_before_it_begins(
    dense, tmp_path, monkeypatch
):
    monkeypatch.setattr("mm1_mlx.quantize.needs.allowed", lambda: 100_000)
    with pytest.raises(
        PromptError, match=r"learning needs .*; give a smaller --count, or"
    ):
        quantize(dense, tmp_path / "out", find_recipe("4bit"), learned=True, count=8)
    assert not list(tmp_path.iterdir())


def test_learned_scales_are_what_is_written(write_model, tmp_path, monkeypatch):
    """Better in float32 is not better: what was decided on is rounded as it is stored."""
    source = write_model(tmp_path / "half", mx.float16)
    decided = []

    def remember(model, reference, *progress):
        cost = measure(model, reference, *progress)
        decided.append(cost.kl_mean)
        return cost

    monkeypatch.setattr("mm1_mlx.quantize.job.measure", remember)
    report = quantize(
        source, tmp_path / "out", uniform("3"), learned=True, count=16, epochs=3
    )
    rounded, learned, written = decided
    assert report.learned
    assert learned < rounded
    # Bit by bit the same weights; the same sums but for the order.
    assert written == pytest.approx(learned, rel=1e-5)


def test_unpacked_weights_give_way_before_an_answer_is_refused(
    dense, tmp_path, monkeypatch
):
    quantize(dense, tmp_path / "out", find_recipe("4bit"), measured=False)

    def kept(model):
        return [x for _, x in named_leaves(model) if "_unpacked" in x]

    with load(tmp_path / "out") as runtime:
        first = generate(runtime, "What is this?", max_tokens=8)
        assert kept(runtime.model)
        runtime.forget()
        room = iter([1000, 10**12])
        monkeypatch.setattr("mm1_mlx.budget.allowed", lambda: next(room))
        again = generate(runtime, "What is this?", max_tokens=8)
        assert not kept(runtime.model)
    assert again.tokens == first.tokens


def test_weights_are_not_kept_unpacked_in_swap(dense, tmp_path, monkeypatch):
    quantize(dense, tmp_path / "out", find_recipe("4bit"), measured=False)
    monkeypatch.setattr("mm1_mlx.room._system", lambda: (0, 10**12))
    monkeypatch.setattr("mm1_mlx.room.mx.get_cache_memory", lambda: 0)
    model = load_model(tmp_path / "out")
    assert not any("_unpacked" in layer for _, layer in named_leaves(model))
