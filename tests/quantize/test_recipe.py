"""Which module is packed how."""

from dataclasses import replace

import mlx.core as mx
import pytest
from mlx_lm.convert import QUANT_RECIPES, mixed_quant_predicate_builder

from mm1_mlx.checkpoint import build_model, load_config
from mm1_mlx.config import MM1Config, Packing, QuantizationConfig
from mm1_mlx.errors import ConfigError
from mm1_mlx.quantize import RECIPES, find_recipe, parse_way, way_of
from mm1_mlx.recipe import COMPONENTS, component_of, fit, plan


@pytest.mark.parametrize(
    ("path", "component"),
    [
        ("vision.layers.0.mlp.fc1", "vision"),
        ("vision.layers.1.mlp.router", "router"),
        ("text.layers.0.self_attn.q_proj", "vision"),
        ("connector.linear", "connector"),
        ("region.out_proj", "connector"),
        ("decoder.layers.0.self_attn.q_proj", "attention"),
        ("decoder.layers.0.mlp.gate_proj", "mlp"),
        ("decoder.layers.0.mlp.switch_mlp.up_proj", "experts"),
        ("decoder.layers.0.mlp.gate", "router"),
        ("decoder.embed_tokens", "head"),
        ("decoder.lm_head", "head"),
    ],
)
def test_every_module_belongs_to_a_component(path, component):
    assert component_of(path) == component


def test_the_default_keeps_what_loses_most(sparse):
    packed = plan(RECIPES["4bit"], load_config(sparse)).packed
    components = {component_of(path) for path in packed}
    assert components == {"attention", "mlp", "experts", "head"}
    for path, way in packed.items():
        bits = 6 if component_of(path) == "head" else 4
        assert way == Packing(group_size=64, bits=bits)


@pytest.mark.parametrize("component", COMPONENTS)
def test_every_component_has_a_way_of_its_own(component, sparse):
    recipe = RECIPES["4bit"].with_ways(
        dict.fromkeys(COMPONENTS) | {component: parse_way("8/32", "x")}
    )
    packed = plan(recipe, load_config(sparse)).packed
    assert {component_of(path) for path in packed} == {component}
    assert set(packed.values()) == {Packing(group_size=32, bits=8)}


@pytest.mark.parametrize("name", QUANT_RECIPES)
def test_mixed_recipes_are_mlx_lm_s(name, dense):
    config = load_config(dense)
    packed = plan(RECIPES[name], config).packed
    rule = mixed_quant_predicate_builder(name, build_model(config, ()))
    layers = {p: way for p, way in packed.items() if ".layers." in p}
    assert len(layers) == 8 * 7
    for path, way in layers.items():
        assert way.bits == rule(path, None)["bits"]
    assert len({way.bits for way in layers.values()}) == 2
    assert packed["decoder.lm_head"].bits == rule("decoder.lm_head", None)["bits"]


def test_a_way_given_for_a_component_is_not_mixed(dense):
    recipe = RECIPES["mixed_3_6"].with_ways({"mlp": parse_way("4/32", "mlp")})
    packed = plan(recipe, load_config(dense)).packed
    ways = {way for path, way in packed.items() if component_of(path) == "mlp"}
    assert ways == {Packing(group_size=32, bits=4)}
    bits = {w.bits for p, w in packed.items() if component_of(p) == "attention"}
    assert bits == {3, 6}


def test_widths_decide_the_group():
    way = Packing(group_size=128, bits=4)
    sizes = [fit(way, width) for width in (256, 192, 96, 48)]
    assert [x and x.group_size for x in sizes] == [128, 64, 32, None]
    assert fit(Packing(group_size=32, bits=4, mode="mxfp4"), 48) is None
    nvfp4 = Packing(group_size=16, bits=4, mode="nvfp4")
    assert fit(nvfp4, 48) == nvfp4


def test_uneven_widths_stay_and_are_said(tiny_config):
    made = plan(RECIPES["4bit"], tiny_config)
    # 48 and 64 wide: only what reads 64 numbers is packed.
    assert set(made.uneven) >= {"decoder.embed_tokens", "decoder.lm_head"}
    assert not set(made.uneven) & set(made.packed)
    assert all(path.endswith(("down_proj", "o_proj")) for path in made.packed)


def test_what_has_nothing_to_pack_is_refused(make_config):
    config = MM1Config(vision=make_config().vision)
    with pytest.raises(ConfigError, match="has nothing that recipe '4bit' packs; name"):
        plan(find_recipe("4bit"), config)


@pytest.mark.parametrize(
    ("text", "way"),
    [
        ("keep", None),
        ("4", Packing(group_size=64, bits=4)),
        ("3/32", Packing(group_size=32, bits=3)),
        ("mxfp4", Packing(group_size=32, bits=4, mode="mxfp4")),
        ("mxfp8", Packing(group_size=32, bits=8, mode="mxfp8")),
        ("nvfp4", Packing(group_size=16, bits=4, mode="nvfp4")),
    ],
)
def test_a_way_is_a_word(text, way):
    assert parse_way(text, "--head") == way


@pytest.mark.parametrize("text", ["affine", "four", "4/", "/32", "-4", "4/3x", "", "٤"])
def test_another_word_is_refused(text):
    with pytest.raises(ConfigError, match=f"^--head '{text}' is not 'keep', bits such"):
        parse_way(text, "--head")


def test_what_mlx_has_not_is_refused():
    with pytest.raises(ConfigError, match=r"--head: bits: 7 is not one of \[2, 3, 4"):
        parse_way("7", "--head")
    with pytest.raises(
        ConfigError, match=r"group_size: 16 is not one of \[32, 64, 128"
    ):
        parse_way("4/16", "--head")
    with pytest.raises(
        ConfigError, match=r"bits: 8 is not one of \[4\], which mode 'mx"
    ):
        way_of("--bits 8", 8, None, "mxfp4")
    with pytest.raises(ConfigError, match="mode 'int4' is not one of"):
        way_of("--mode", mode="int4")
    with pytest.raises(ConfigError, match="recipe '5bit' is not one of"):
        find_recipe("5bit")


@pytest.mark.parametrize(
    "word", ["2", "3", "4", "4/32", "8", "mxfp4", "mxfp8", "nvfp4"]
)
def test_bits_of_a_weight_are_what_the_disk_holds(word):
    way = parse_way(word, "x")
    weight = mx.ones((2, 128), mx.float16)
    size = sum(part.nbytes for part in mx.quantize(weight, **way.to_dict()))
    assert way.bits_per_weight() == 8 * size / weight.size


def test_the_config_is_mlx_lm_s_form():
    four, six = Packing(group_size=64, bits=4), Packing(group_size=32, bits=6)
    made = QuantizationConfig.of_modules({"b": six, "c": four, "a": four})
    values = made.to_dict()
    assert values == four.to_dict() | {"b": six.to_dict()}
    assert QuantizationConfig.from_dict(values) == made
    assert (made.way("a"), made.way("b")) == (four, six)
    assert hash(made) == hash(replace(made))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 4}, r"QuantizationConfig: missing field\(s\) \['group_size'"),
        (
            {"bits": 4, "group_size": 64, "a": {"bits": 4}},
            r"Packing: missing field\(s\)",
        ),
        ({"bits": 4, "group_size": 64, "a": 4}, r"unknown field\(s\) \['a'\]"),
        ({"bits": 4, "group_size": 64, "modules": [["a", 1]]}, "modules: expected str"),
        ({"bits": 4, "group_size": 16}, "which mode 'affine' has"),
        ({"bits": 4, "group_size": 64, "mode": "mxfp4"}, r"is not one of \[32\]"),
        ([], r"QuantizationConfig: expected an object, got \[\]"),
    ],
)
def test_another_form_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        QuantizationConfig.from_dict(values)
