"""Published and computed sizes of MM1's parts, built without allocating them."""

import json
import subprocess
import sys

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mm1_mlx.config import CAbstractorConfig, VisionConfig
from mm1_mlx.models import MM1
from mm1_mlx.models.connector import CAbstractor
from mm1_mlx.models.decoder import Decoder
from mm1_mlx.models.resample import pooling_matrix
from mm1_mlx.models.vision import VisionEncoder
from mm1_mlx.presets import PRESETS, VIT_H_14_378, VIT_L_14_336

# Decoder parameters without embeddings, in billions, of our inferred sizes.
NON_EMBEDDING = {
    "mm1-1.2b": 1.233,
    "mm1-3b": 2.914,
    "mm1-7b": 6.443,
    "mm1-30b": 29.68,
    "mm1-3b-moe": 63.78,
    "mm1-7b-moe": 47.01,
    "afm-3b": 2.587,
}


@pytest.mark.parametrize(
    ("config", "count"), [(VIT_H_14_378, 631_371_520), (VIT_L_14_336, 303_507_456)]
)
def test_encoders_have_the_published_number_of_parameters(
    config, count, parameter_count
):
    assert parameter_count(VisionEncoder(config)) == count


@pytest.mark.parametrize(
    ("size", "patches"),
    [
        (224, 256),
        (336, 576),
        (378, 729),
        (448, 1024),
        (560, 1600),
        (672, 2304),
        (896, 4096),
    ],
)
def test_patches_per_tile(size, patches):
    values = VIT_H_14_378.to_dict() | {"image_size": size}
    assert VisionConfig.from_dict(values).num_patches == patches


def test_sixteen_pictures_fit_the_context_only_because_of_the_connector():
    config = PRESETS["mm1-3b"]
    assert config.num_image_tokens == 144
    assert 16 * config.num_image_tokens == 2304
    assert 16 * config.vision.num_features == 11_664
    assert 2304 < config.decoder.max_position_embeddings < 11_664
    # A picture in five tiles; ten tiles; 24 frames of a video.
    assert [n * config.num_image_tokens for n in (5, 10, 24)] == [720, 1440, 3456]


@pytest.mark.parametrize(
    ("features", "width", "output", "count"),
    [
        (576, 1024, 4096, 37_398_016),
        (256, 1024, 4096, 37_070_336),
        (729, 1280, 2048, 24_763_200),
        (729, 1280, 3072, 31_056_704),
        (729, 1280, 4096, 39_447_360),
        (729, 1280, 7168, 77_202_240),
    ],
)
def test_c_abstractors_have_the_computed_number_of_parameters(
    features, width, output, count, parameter_count
):
    config = CAbstractorConfig(
        input_size=width,
        num_features=features,
        output_size=output,
        num_image_tokens=144,
    )
    assert parameter_count(CAbstractor(config)) == count


def test_c_abstractor_tensors_have_honeybees_shapes():
    connector = CAbstractor(PRESETS["mm1-30b"].connector)
    shapes = {name: x.shape for name, x in tree_flatten(connector.parameters())}
    first, later = "stage1.0", "stage2.2"
    expected = {
        "position_embedding": (729, 1280),
        f"{first}.conv1.weight": (1024, 1280),
        f"{first}.conv2.weight": (1024, 3, 3, 1),
        f"{first}.se.fc1.weight": (320, 1024),
        f"{first}.se.fc2.weight": (1024, 320),
        f"{first}.shortcut.conv.weight": (1024, 1280),
        f"{first}.shortcut.norm.bias": (1024,),
        f"{later}.conv1.weight": (1024, 1024),
        f"{later}.se.fc1.weight": (256, 1024),
        f"{later}.se.fc1.bias": (256,),
        "readout.0.weight": (7168, 1024),
        "readout.1.bias": (7168,),
    }
    assert {name: shapes[name] for name in expected} == expected
    assert sum("shortcut" in name for name in shapes) == 3
    assert len([name for name in shapes if name.endswith("conv2.weight")]) == 6


def test_twelve_bins_over_27_patches_overlap_and_are_three_wide():
    rows = pooling_matrix(27, 12).tolist()
    bins = [[i for i, weight in enumerate(row) if weight] for row in rows]
    assert [(b[0], b[-1] + 1) for b in bins] == [
        (0, 3), (2, 5), (4, 7), (6, 9), (9, 12), (11, 14),
        (13, 16), (15, 18), (18, 21), (20, 23), (22, 25), (24, 27),
    ]  # fmt: skip
    assert {weight for row in rows for weight in row} == {0, mx.array(1 / 3).item()}


@pytest.mark.parametrize("name", PRESETS)
def test_decoders_have_the_computed_number_of_parameters(name, parameter_count):
    decoder = Decoder(PRESETS[name].decoder)
    billions = (parameter_count(decoder) - decoder.embed_tokens.weight.size) / 1e9
    assert f"{billions:.4g}" == f"{NON_EMBEDDING[name]:.4g}"


@pytest.mark.parametrize(("name", "total"), [("mm1-3b-moe", 64), ("mm1-7b-moe", 47)])
def test_expert_models_round_to_the_papers_totals(name, total, parameter_count):
    assert round(parameter_count(Decoder(PRESETS[name].decoder)) / 1e9) == total


def test_expert_models_have_the_papers_sparse_layers():
    sparse = {}
    for name in ("mm1-3b-moe", "mm1-7b-moe"):
        decoder = PRESETS[name].decoder
        layers = range(decoder.num_hidden_layers)
        sparse[name] = [i for i in layers if decoder.is_sparse(i)]
    assert sparse["mm1-3b-moe"] == list(range(1, 26, 2))
    assert sparse["mm1-7b-moe"] == list(range(3, 32, 4))


def test_building_every_preset_takes_no_memory():
    code = (
        "import json, resource, sys\n"
        "from mm1_mlx.models import MM1\n"
        "from mm1_mlx.presets import PRESETS\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "counts = {k: sum(x.size for x in MM1(v).tensors().values())"
        " for k, v in PRESETS.items()}\n"
        "print(json.dumps([peak() - before, counts]))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    growth, counts = json.loads(out.stdout)
    kilobytes = growth / 1024 if sys.platform == "darwin" else growth
    assert kilobytes < 50_000
    for name, billions in NON_EMBEDDING.items():
        embeddings = 49_152 * PRESETS[name].decoder.hidden_size
        rest = (counts[name] - embeddings) / 1e9 - billions
        sees = PRESETS[name].sees
        # The encoder and the connector, where there are some.
        assert 0.3 < rest < 0.75 if sees else abs(rest) < 0.001


def test_a_model_is_the_sum_of_its_parts(parameter_count):
    config = PRESETS["mm1-3b"]
    parts = [
        VisionEncoder(config.vision),
        CAbstractor(config.connector),
        Decoder(config.decoder),
    ]
    assert parameter_count(MM1(config)) == sum(map(parameter_count, parts))
