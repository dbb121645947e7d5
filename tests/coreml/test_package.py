"""A package computes what the model computes, whatever the member, layout and precision."""

import json

import coremltools as ct
import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mm1_mlx.checkpoint import load_config
from mm1_mlx.config import MM1Config, QuantizationConfig
from mm1_mlx.coreml.check import tiles_of
from mm1_mlx.coreml.describe import CONFIG_KEY, Facts
from mm1_mlx.coreml.interpreter import Interpreter, read_spec
from mm1_mlx.coreml.package import export
from mm1_mlx.coreml.program import CHUNK_BLOCKS, IMAGE, IMAGE_TOKENS, Plan
from mm1_mlx.coreml.weights import Weights
from mm1_mlx.errors import ConfigError
from mm1_mlx.models import MM1
from mm1_mlx.models.linear import pack

from .conftest import ENCODERS, L2, LARGEST, MEMBERS, write

# Packed matrices of a model of this size with random weights; measured 0.6 of these.
ROUNDING = {"int8": 0.03, "4bit": 0.35}


@pytest.mark.parametrize("ane", [False, True], ids=["nlc", "bc1s"])
@pytest.mark.parametrize(("encoder", "connector"), MEMBERS)
def test_every_member_in_half_precision(
    encoder, connector, ane, member, photographs, tmp_path
):
    path, out = member(encoder, connector), tmp_path / "E.mlpackage"
    if ane and "moe" in ENCODERS[encoder]:
        with pytest.raises(
            ConfigError, match=r"chooses its experts by the picture.*--ane"
        ):
            export(path, out, Plan(ane=True))
        assert not list(tmp_path.iterdir())
        return
    facts, found = export(path, out, Plan(ane=ane), pictures=photographs)
    assert facts.sizes == (16,)
    (stages,) = found.values()
    names = [stage.name for stage in stages]
    depth = load_config(path).vision.depth
    assert names[:depth] == [f"vision_layers_{i}" for i in range(depth)]
    assert names[-1] == IMAGE_TOKENS
    assert stages[-1].l2 <= L2
    assert stages[-1].largest <= LARGEST
    # Half precision rounds: an error of nothing would be no comparison.
    assert stages[-1].l2 > 1e-5


@pytest.mark.parametrize("ane", [False, True], ids=["nlc", "bc1s"])
@pytest.mark.parametrize(
    ("encoder", "connector"),
    [("clip", "c_abstractor"), ("aimv2", "perceiver")],
)
def test_in_single_precision_it_is_the_model(
    encoder, connector, ane, member, photographs, tmp_path, tolerances
):
    out = tmp_path / "E.mlpackage"
    plan = Plan("fp32", ane=ane, as_image=False)
    _, found = export(member(encoder, connector), out, plan, pictures=photographs)
    assert all(x.largest <= tolerances["model"] for x in found[16])


@pytest.mark.parametrize("precision", ROUNDING)
def test_packed_weights_are_smaller_and_near(precision, member, photographs, tmp_path):
    path = member(hidden_size=32, intermediate_size=2048)
    sizes = {}
    for kind in ("fp16", precision):
        out = tmp_path / f"{kind}.mlpackage"
        _, found = export(path, out, Plan(kind), pictures=photographs)
        sizes[kind] = (out / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size
    share = {"int8": 1 / 2, "4bit": 1 / 4}[precision]
    assert share < sizes[precision] / sizes["fp16"] < share + 0.1
    assert 1e-3 < found[16][-1].l2 < ROUNDING[precision]


def test_a_deep_encoder_is_a_chain_of_chunks(member, photographs, tmp_path):
    depth = CHUNK_BLOCKS + 2
    # A C-Abstractor of random weights multiplies what so many blocks have rounded.
    path = member(connector="mlp", num_hidden_layers=depth, feature_layer=-1)
    out = tmp_path / "E.mlpackage"
    _, found = export(path, out, Plan(ane=True), pictures=photographs)
    assert found[16][-1].l2 <= L2
    chunks = read_spec(out).pipeline.models
    assert len(chunks) == 2
    assert [_count_blocks(chunk) for chunk in chunks] == [CHUNK_BLOCKS, 2]
    # As one model from outside.
    spec = read_spec(out).description
    assert [x.name for x in spec.input] == [IMAGE]
    assert [x.name for x in spec.output] == [IMAGE_TOKENS]


def _count_blocks(model):
    (function,) = model.mlProgram.functions.values()
    (block,) = function.block_specializations.values()
    layers = [x.outputs[0].name for x in block.operations if x.type == "conv"]
    return sum(name.endswith("mlp_fc2") for name in layers)


def test_several_sizes_are_functions_that_share_their_weights(
    member, photographs, tmp_path
):
    path = member()
    one, both = tmp_path / "one.mlpackage", tmp_path / "both.mlpackage"
    export(path, one, Plan())
    facts, found = export(path, both, Plan(), (24, 16), pictures=photographs)
    assert set(found) == {16, 24}
    assert all(stages[-1].l2 <= L2 for stages in found.values())
    spec = read_spec(both).description
    assert {x.name for x in spec.functions} == {"tile_16", "tile_24"}
    assert spec.defaultFunctionName == "tile_16"
    assert [facts.function(size) for size in facts.sizes] == ["tile_24", "tile_16"]
    # Positions differ, and nothing else.
    sizes = [
        (x / "Data/com.apple.CoreML/weights/weight.bin").stat().st_size
        for x in (one, both)
    ]
    assert sizes[1] < 1.3 * sizes[0]
    with pytest.raises(ConfigError, match="holds one resolution"):
        export(path, tmp_path / "x.mlpackage", Plan(ane=True), (16, 24))
    with pytest.raises(ConfigError, match=r"17 is not a multiple of .* patches of 4"):
        export(path, tmp_path / "x.mlpackage", Plan(), (17,))


def test_an_encoder_alone_gives_features(make_config, reinitialise, tmp_path):
    config = make_config(connector=None, decoder=None, prompt=None)
    path = write(tmp_path / "model", reinitialise(MM1(config)))
    tile = np.full((16, 16, 3), 200, np.uint8)
    _, found = export(
        path, tmp_path / "E.mlpackage", Plan(), pictures=[Image.fromarray(tile)]
    )
    assert found[16][-1].name == "features"
    assert found[16][-1].l2 <= L2


def test_a_packed_model_is_exported_as_what_it_stands_for(
    make_config, reinitialise, photographs, tmp_path
):
    way = QuantizationConfig(group_size=32, bits=4)
    model = reinitialise(MM1(make_config(decoder=None, prompt=None)))
    for layer in model.vision.layers:
        layer.mlp.fc1 = pack(layer.mlp.fc1, way)
    model.config = MM1Config.from_dict(
        model.config.to_dict() | {"quantization": way.to_dict()}
    )
    path = write(tmp_path / "model", model)
    _, found = export(
        path, tmp_path / "E.mlpackage", Plan("fp32"), pictures=photographs
    )
    assert found[16][-1].l2 < 1e-5


def test_it_says_what_it_is(member, tmp_path):
    path, out = member(), tmp_path / "E.mlpackage"
    facts, found = export(path, out, Plan("int8", as_image=False))
    assert found == {}
    model = ct.models.MLModel(str(out), skip_model_load=True)
    assert model.author == "a test, exported by mm1-mlx"
    assert "not stated" in model.license
    assert "16 x 16 pixels; weights in int8" in model.short_description
    assert "Red, green and blue from 0 to 1" in model.input_description[IMAGE]
    assert "[1, K, D]" in model.output_description[IMAGE_TOKENS]
    metadata = dict(model.user_defined_metadata)
    assert Facts.read(metadata) == facts
    config = MM1Config.from_dict(json.loads(metadata[CONFIG_KEY]))
    assert config == Weights(path).config


def test_a_picture_and_its_numbers_are_the_same_to_it(member, photographs, tmp_path):
    path = member()
    image, tensor = tmp_path / "i.mlpackage", tmp_path / "t.mlpackage"
    export(path, image, Plan("fp32"))
    export(path, tensor, Plan("fp32", as_image=False))
    assert read_spec(image).description.input[0].type.WhichOneof("Type") == "imageType"
    weights = Weights(path)
    pixels = tiles_of(weights, photographs[:1], 16)
    shown = (pixels * 0.5 + 0.5).transpose(0, 3, 1, 2)
    seen = [
        Interpreter(image)({IMAGE: np.rint(shown * 255)})[IMAGE_TOKENS],
        Interpreter(tensor)({IMAGE: shown})[IMAGE_TOKENS],
    ]
    model = weights.model()
    expected = np.array(model.connector(model.vision(mx.array(pixels))))
    for tokens in seen:
        assert np.abs(tokens - expected).max() < 1e-4 * np.abs(expected).max()
