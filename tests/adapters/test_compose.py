"""Adapters put to use: fused as weights are read, or beside packed ones; several at once."""

import logging
from dataclasses import replace

import mlx.core as mx
import pytest

from mm1_mlx.adapters import Adapter, Adapters, load_adapted, parse, save
from mm1_mlx.adapters.attach import wrapped
from mm1_mlx.checkpoint import load_model
from mm1_mlx.errors import CheckpointError, ConfigError
from mm1_mlx.quantize import find_recipe

MOE = {"num_experts": 4, "experts_per_token": 2, "every": 1, "offset": 0}
PATH = "decoder.layers.0.self_attn.q_proj"


@pytest.fixture
def logits(tokens):
    """A function: what a model says."""
    return lambda model: model(tokens)


def of(*names):
    return Adapters.load(names)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("packed", [False, True])
def test_it_computes_what_was_trained(
    folder, packed_folder, keep, assert_close, kind, packed, logits
):
    path = packed_folder if packed else folder
    out, trained = keep(path, kind=kind)
    plain = logits(load_model(path, mx.float32))
    for beside in (False, True):
        model = load_adapted(path, of(out), mx.float32, beside=beside)
        assert bool(wrapped(model)) == (packed or beside)
        assert_close(logits(model), trained, "op")
    # It has an effect, which neither road could leave out unseen.
    assert mx.abs(trained - plain).max() > 0.05 * mx.abs(trained).max()


def test_experts_embeddings_and_the_head_too(
    write_model, keep, tmp_path, assert_close, wide, logits
):
    for recipe in (None, find_recipe("8bit")):
        changes = wide | {"decoder": wide["decoder"] | {"moe": MOE}}
        path = write_model(tmp_path / f"model-{recipe is None}", recipe, **changes)
        out, trained = keep(path, where=("decoder", "head"))
        model = load_adapted(path, of(out), mx.float32)
        assert ("decoder.embed_tokens" in wrapped(model)) == (recipe is not None)
        assert_close(logits(model), trained, "op")


def test_weights_trained_in_full_take_their_place(folder, keep, assert_close, logits):
    out, trained = keep(folder, full=["decoder.norm", "connector"])
    model = load_adapted(folder, of(out), mx.float32)
    assert_close(logits(model), trained, "op")
    given = of(out).given[0][0]
    name = "connector.stage1.0.conv2.weight"
    assert mx.array_equal(model.tensors()[name], given.tensors[name])
    half = load_adapted(folder, of((out, 0.5)), mx.float32).tensors()[name]
    before = load_model(folder, mx.float32).tensors()[name]
    assert_close(half, (before + given.tensors[name]) / 2, "op")


@pytest.mark.parametrize("packed", [False, True])
def test_several_are_the_sum_of_their_changes(
    folder, packed_folder, keep, assert_close, packed, logits
):
    """Ranks and places differ; the expected weights are summed by hand."""
    path = packed_folder if packed else folder
    one, _ = keep(path, rank=3, scale=0.7)
    other, _ = keep(path, rank=5, seed=1, where=("decoder.attention",))
    model = load_model(path, mx.float32)
    for layer_path, layer in list(model.named_modules()):
        if not layer_path.startswith("decoder.layers.") or "weight" not in layer:
            continue
        total = mx.zeros(1)
        for (adapter, _), share in zip(of(one, other).given, (0.5, -2.0), strict=True):
            if layer_path in adapter.layers:
                a, b = (adapter.tensors[f"{layer_path}.lora_{x}"] for x in "ab")
                total = total + share * adapter.config.scale * (a @ b).T
        if total.ndim == 2:
            weight = layer.weight
            if packed:
                weight = mx.dequantize(
                    layer.weight, layer.scales, layer.biases,
                    layer.group_size, layer.bits,
                )  # fmt: skip
            import mlx.nn as nn

            linear = nn.Linear(*reversed(weight.shape), bias=False)
            linear.weight = weight + total
            parent, _, leaf = layer_path.rpartition(".")
            dict(model.named_modules())[parent][leaf] = linear
    both = load_adapted(path, of((one, 0.5), (other, -2.0)), mx.float32)
    assert_close(logits(both), logits(model), "op")


def test_scales_of_single_layers_count(folder, train, tmp_path, assert_close, logits):
    _, adapter = train(folder)
    tensors = dict(adapter.tensors)
    save(tmp_path / "a", Adapter(adapter.config, tensors, adapter.base, {PATH: 0.5}))
    # The same, said by the matrix: the config's scale is 2.
    tensors[f"{PATH}.lora_b"] = tensors[f"{PATH}.lora_b"] / 4
    save(tmp_path / "b", Adapter(adapter.config, tensors, adapter.base))
    one, other = (
        load_adapted(folder, of(tmp_path / name), mx.float32) for name in "ab"
    )
    assert_close(logits(one), logits(other), "op")


def test_halves_are_rounded_once(folder, keep):
    """The float16 weight is the nearest to the float32 sum, not to a sum of halves."""
    out, _ = keep(folder)
    adapter = of(out).given[0][0]
    model = load_adapted(folder, of(out), mx.float16)
    weight = load_model(folder, mx.float32).tensors()[f"{PATH}.weight"]
    a, b = (adapter.tensors[f"{PATH}.lora_{x}"] for x in "ab")
    exact = weight + (a @ (2.0 * b)).T
    assert mx.array_equal(model.tensors()[f"{PATH}.weight"], exact.astype(mx.float16))


def test_without_adapters_nothing_is_asked(folder, logits):
    model = load_adapted(folder, Adapters(()), mx.float32)
    assert mx.array_equal(logits(model), logits(load_model(folder, mx.float32)))


def test_dora_stands_alone(folder, keep):
    dora, lora = keep(folder, kind="dora")[0], keep(folder)[0]
    for names in ((dora, lora), ((dora, 0.5),)):
        with pytest.raises(
            CheckpointError, match=r"is a DoRA adapter, .* fuse it first"
        ):
            of(*names)


def test_what_two_changed_of_a_weight_in_full_is_added(folder, train, tmp_path):
    _, adapter = train(folder, full=["decoder.norm"])
    name = "decoder.norm.weight"
    base = load_model(folder, mx.float32).tensors()[name]
    mx.random.seed(5)
    drawn = mx.random.normal(base.shape)
    other = Adapter(adapter.config, adapter.tensors | {name: drawn}, adapter.base)
    save(tmp_path / "a", adapter)
    matrices = {k: -x for k, x in adapter.tensors.items() if k.endswith("lora_b")}
    same = Adapter(adapter.config, adapter.tensors | matrices, adapter.base)
    save(tmp_path / "b", same)
    save(tmp_path / "c", other)
    trained = adapter.tensors[name]
    a, b, c = (tmp_path / x for x in "abc")
    for names, expected in (
        ([a], trained),
        ([(c, 0.5)], base + 0.5 * (drawn - base)),
        # What is the same was changed once.
        ([a, b], trained),
        ([a, c], trained + drawn - base),
        ([(a, -1.0), (c, 2.0)], base - (trained - base) + 2 * (drawn - base)),
    ):
        found = load_adapted(folder, of(*names), mx.float32).tensors()[name]
        assert mx.allclose(found, expected, atol=1e-6), names
        assert mx.allclose(
            of(*names).replaced(name, base[3:9], slice(3, 9)), expected[3:9]
        )


def test_another_base_is_said_where_shapes_fit(
    folder, packed_folder, keep, caplog, capsys
):
    out, _ = keep(packed_folder)
    with caplog.at_level(logging.WARNING, "mm1_mlx"):
        load_adapted(folder, of(out), mx.float32)
    (record,) = caplog.records
    assert "was trained on 'tiny'" in record.message
    caplog.clear()
    load_adapted(packed_folder, of(out), mx.float32)
    assert not caplog.records
    assert capsys.readouterr().out == ""


def test_another_base_is_refused_where_they_do_not(
    write_model, folder, keep, tmp_path, wide
):
    out, _ = keep(folder)
    changes = wide | {"decoder": wide["decoder"] | {"intermediate_size": 128}}
    other = write_model(tmp_path / "other", **changes)
    with pytest.raises(CheckpointError, match=r"does not fit the model: .*not .*128"):
        load_adapted(other, of(out), mx.float32)
    shallow = write_model(
        tmp_path / "shallow",
        **wide | {"decoder": wide["decoder"] | {"num_hidden_layers": 1}},
    )
    with pytest.raises(CheckpointError, match="the model has no such layer"):
        load_adapted(shallow, of(out), mx.float32)


def test_a_packed_weight_cannot_be_one_that_was_trained_in_full(
    folder, packed_folder, keep
):
    out, _ = keep(folder, where=("vision",), full=["decoder.layers.0.mlp"])
    with pytest.raises(CheckpointError, match="trained in full, but is packed here"):
        load_adapted(packed_folder, of(out), mx.float32)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", ("a", 1.0)),
        ("a:0.5", ("a", 0.5)),
        ("a:-1", ("a", -1.0)),
        ("./b:c", ("./b:c", 1.0)),
        ("o/r:2", ("o/r", 2.0)),
    ],
)
def test_a_scale_stands_behind_a_colon(text, expected):
    assert parse(text) == expected


def test_a_folder_of_the_whole_name_wins(tmp_path):
    (tmp_path / "a:2").mkdir()
    assert parse(str(tmp_path / "a:2")) == (str(tmp_path / "a:2"), 1.0)


@pytest.mark.parametrize("number", ["0", "nan", "inf", "1e9"])
def test_a_scale_that_is_none_is_refused(number):
    with pytest.raises(ConfigError, match=r"adapter 'a': scale .* is 0 or beyond"):
        parse(f"a:{number}")


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_some_rows_are_rows_of_the_whole(folder, train, kind):
    _, adapter = train(folder, kind=kind, full=["connector"])
    adapters = Adapters(((adapter, 1.0),))
    weights = load_model(folder, mx.float32).tensors()
    weight = weights[f"{PATH}.weight"]
    whole = adapters.fused(PATH, "linear", weight)
    for rows in (slice(0, 5), slice(40, 64)):
        part = adapters.fused(PATH, "linear", weight[rows], rows)
        assert mx.allclose(part, whole[rows], 1e-6, 1e-6)
    name = "connector.readout.0.weight"
    some = adapters.replaced(name, weights[name][3:7], slice(3, 7))
    assert mx.array_equal(some, adapter.tensors[name][3:7])


def test_the_resolution_is_the_one_that_was_learned_from(folder, train, tmp_path):
    _, adapter = train(folder)
    _, other = train(folder, seed=1)
    learned = {"a": (adapter, "32"), "b": (other, "2x16"), "c": (other, None)}
    for name, (x, mode) in learned.items():
        save(tmp_path / name, replace(x, training={"resolution": mode} if mode else {}))
    a, b, c = (tmp_path / name for name in learned)
    assert of(a).resolution() == of(a, c).resolution() == "32"
    assert of(c).resolution() is None
    with pytest.raises(
        ConfigError, match=r"different resolutions, .*a at 32 and .*b at"
    ):
        of(a, b).resolution()
    assert of(a, b).resolution("64") == "64"
