"""What mlx-lm and mlx-vlm quantized stays so, and computes what their weights compute.

The decoders' oracle is mlx-lm's own model after ``nn.quantize``; LLaVA's, which mlx-lm does
not have, is the same source with every packed weight unpacked by ``mx.dequantize``.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import sources
from mlx.utils import tree_flatten
from mlx_lm.convert import mixed_quant_predicate_builder
from mlx_lm.models import llama, mixtral, olmoe, qwen3
from mlx_lm.utils import quantize_model
from sources import Tensors

from mm1_mlx.apps.inspect import describe
from mm1_mlx.checkpoint import load_config, load_model
from mm1_mlx.config import QuantizationConfig
from mm1_mlx.convert import convert
from mm1_mlx.errors import CheckpointError, ConfigError
from mm1_mlx.layout import Picture, Span
from mm1_mlx.models import MM1

TOLERANCE = 1e-4
TOKENS = mx.array([[5, 9, 30, 2, 17, 40]])
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
}
LLAMA = SIZES | {
    "model_type": "llama",
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
QWEN3 = SIZES | {
    "model_type": "qwen3",
    "head_dim": 16,
    "rope_theta": 1e6,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
MIXTRAL = LLAMA | {
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
OLMOE = LLAMA | {
    "model_type": "olmoe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": False,
}
LIBRARIES = {"llama": llama, "qwen3": qwen3, "mixtral": mixtral, "olmoe": olmoe}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "skip_vision": False,
}
LLAVA = {
    "model_type": "llava",
    "image_token_index": 95,
    "text_config": LLAMA,
    "vision_config": CLIP,
}
PACKING = {"group_size": 32, "bits": 4}


def fresh(module: nn.Module) -> None:
    """Every parameter new, norms and biases too."""
    mx.random.seed(0)
    pairs = [
        (
            name,
            mx.random.normal(x.shape) * (0.2 if x.ndim == 1 else x.shape[-1] ** -0.5),
        )
        for name, x in tree_flatten(module.parameters())
    ]
    module.load_weights([(n, x + 1 if x.ndim == 1 else x) for n, x in pairs])


def by_mlx_lm(
    folder: Path, config: dict[str, Any], packing: dict[str, Any], **other: Any
) -> tuple[Path, Any]:
    """A folder as mlx-lm writes it, and the model it was made from."""
    library: Any = LIBRARIES[config["model_type"]]
    model = library.Model(library.ModelArgs.from_dict(config))
    fresh(model)
    nn.quantize(model, **packing)
    tensors = dict(tree_flatten(model.parameters()))
    both = {"quantization": packing, "quantization_config": packing}
    return sources.write(folder, config | both | other, tensors), model


def difference(ours: mx.array, theirs: mx.array) -> float:
    return float(mx.abs(ours - theirs).max() / mx.abs(theirs).max())


@pytest.mark.parametrize(
    "packing",
    [
        PACKING,
        {"group_size": 64, "bits": 8},
        {"group_size": 32, "bits": 3, "mode": "affine"},
        {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    ],
)
@pytest.mark.parametrize("config", [LLAMA, QWEN3, MIXTRAL, OLMOE])
def test_decoders_that_mlx_lm_quantized_compute_what_it_does(
    config: dict[str, Any], packing: dict[str, Any], tmp_path: Path
) -> None:
    folder, reference = by_mlx_lm(tmp_path / "in", config, packing)
    report = convert(str(folder), tmp_path / "out")
    assert report.config.quantization == QuantizationConfig.from_dict(packing)
    model = load_model(tmp_path / "out")
    assert difference(model(TOKENS), reference(TOKENS)) <= TOLERANCE
    q_proj = model.decoder.layers[1].self_attn.q_proj
    assert isinstance(q_proj, nn.QuantizedLinear)
    assert q_proj.weight.dtype == mx.uint32


def llava_tensors() -> Tensors:
    """The tensors of ``LLAVA``, as PyTorch lays them out."""
    shapes = dict(llama_shapes("language_model.model.", "language_model."))
    for i, inputs in ((1, 64), (2, 64)):
        shapes[f"multi_modal_projector.linear_{i}.weight"] = (64, inputs)
        shapes[f"multi_modal_projector.linear_{i}.bias"] = (64,)
    tower = "vision_tower.vision_model."
    for name, x in sources.clip_tensors(tower).items():
        sizes = {8: 64, 12: 96}
        shape = tuple(sizes.get(n, n) for n in x.shape)
        if "patch_embedding" in name:
            shape = (64, 3, 8, 8)
        shapes[name] = shape
    keys = mx.random.split(mx.random.key(1), len(shapes))
    return {
        name: mx.random.normal(shape, key=key)
        * (0.2 if len(shape) == 1 else np.prod(shape[1:]).item() ** -0.5)
        + (len(shape) == 1 and name.endswith("weight"))
        for (name, shape), key in zip(shapes.items(), keys, strict=True)
    }


def llama_shapes(model: str, head: str) -> list[tuple[str, tuple[int, ...]]]:
    sizes = {16: 64, 8: 32, 24: 128, 64: 96}
    return [
        (name, tuple(sizes[n] for n in x.shape))
        for name, x in sources.llama_tensors(model, head).items()
    ]


def by_mlx_vlm(
    folder: Path,
    chosen: Callable[[str], bool] = lambda _: True,
    packing: dict[str, Any] = PACKING,
) -> tuple[Path, Path]:
    """A LLaVA as mlx-vlm writes it, and its twin whose weights are unpacked again."""
    packed: Tensors = {}
    twin: Tensors = {}
    for name, tensor in llava_tensors().items():
        module = name.removesuffix(".weight")
        if name.endswith("patch_embedding.weight"):
            packed[name], twin[name] = tensor.transpose(0, 2, 3, 1), tensor
        elif tensor.ndim == 2 and chosen(name):
            parts = mx.quantize(tensor, **packing)
            for leaf, part in zip(("weight", "scales", "biases"), parts, strict=False):
                packed[f"{module}.{leaf}"] = part
            twin[name] = mx.dequantize(*parts, **packing).astype(mx.float32)
        else:
            packed[name] = twin[name] = tensor
    return (
        sources.write(folder / "packed", LLAVA | {"quantization": packing}, packed),
        sources.write(folder / "twin", LLAVA, twin),
    )


def seen(model: MM1) -> mx.array:
    """Logits of tokens around a picture."""
    pixels = np.random.default_rng(0).standard_normal((1, 32, 32, 3)).astype(np.float32)
    image_tokens = model.encode([Picture((pixels[0],), (32, 32), "")])
    count = image_tokens[0].shape[0]
    tokens = mx.concatenate([TOKENS[0, :3], mx.zeros(count, mx.int32), TOKENS[0, 3:]])
    spans = [Span(3, count, "picture", 0, "")]
    embeddings = model.embed(tokens, image_tokens, spans)[None]
    return model(tokens[None], None, embeddings)


def weights_of(out: Path) -> int:
    return sum(path.stat().st_size for path in out.glob("*.safetensors"))


def no_vision(name: str) -> bool:
    return "vision_tower" not in name


@pytest.mark.parametrize("chosen", [lambda _: True, no_vision])
def test_llava_that_mlx_vlm_quantized_computes_what_its_weights_do(
    chosen: Callable[[str], bool], tmp_path: Path
) -> None:
    packed, twin = by_mlx_vlm(tmp_path, chosen)
    convert(str(packed), tmp_path / "out")
    convert(str(twin), tmp_path / "float")
    model, plain = load_model(tmp_path / "out"), load_model(tmp_path / "float")
    assert difference(seen(model), seen(plain)) <= TOLERANCE
    assert weights_of(tmp_path / "out") < 0.6 * weights_of(tmp_path / "float")
    vision, connector = model.vision.layers[0].mlp.fc1, model.connector.linear_1
    assert isinstance(vision, nn.QuantizedLinear) == (chosen is not no_vision)
    assert isinstance(connector, nn.QuantizedLinear)
    # A bare array here, which cannot be packed.
    assert model.vision.position_embedding.dtype == mx.float32


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8"])
def test_pictures_are_not_rounded_to_what_a_packed_table_gives(
    mode: str, tmp_path: Path
) -> None:
    packing = {"group_size": 32, "bits": 4 if mode == "mxfp4" else 8, "mode": mode}
    packed, twin = by_mlx_vlm(tmp_path, packing=packing)
    convert(str(packed), tmp_path / "out")
    convert(str(twin), tmp_path / "float")
    model = load_model(tmp_path / "out", mx.float32)
    plain = load_model(tmp_path / "float", mx.float32)
    assert difference(seen(model), seen(plain)) <= TOLERANCE
    half = load_model(tmp_path / "out", mx.float16)
    assert seen(half).dtype == mx.float16


def test_the_layer_that_is_not_built_is_dropped_whole(tmp_path: Path) -> None:
    packed, _ = by_mlx_vlm(tmp_path)
    report = convert(str(packed), tmp_path / "out")
    (dropped,) = report.dropped.values()
    fc1 = "vision_tower.vision_model.encoder.layers.1.mlp.fc1"
    leaves = ("weight", "scales", "biases", "bias")
    assert {f"{fc1}.{leaf}" for leaf in leaves} <= set(dropped)


@pytest.mark.parametrize("at", ["conversion", "loading"])
def test_casting_leaves_packed_integers_alone(at: str, tmp_path: Path) -> None:
    folder, reference = by_mlx_lm(tmp_path / "in", LLAMA, PACKING)
    early = mx.float16 if at == "conversion" else None
    convert(str(folder), tmp_path / "out", dtype=early)
    model = load_model(tmp_path / "out", None if early else mx.float16)
    kinds = {name: x.dtype for name, x in model.tensors().items()}
    assert set(kinds.values()) == {mx.uint32, mx.float16}
    assert {n for n, kind in kinds.items() if kind == mx.uint32} == {
        f"{n.removesuffix('.scales')}.weight" for n in kinds if n.endswith(".scales")
    }
    found = model(TOKENS).astype(mx.float32)
    assert difference(found, reference(TOKENS)) <= 2e-2


def test_a_packed_decoder_joins_a_float_encoder(tmp_path: Path) -> None:
    folder, reference = by_mlx_lm(tmp_path / "in", LLAMA, PACKING)
    clip = str(sources.clip(tmp_path / "clip"))
    convert(str(folder), tmp_path / "out", vision=clip, connector="mlp")
    model = load_model(tmp_path / "out")
    assert difference(model(TOKENS), reference(TOKENS)) <= TOLERANCE
    assert isinstance(model.connector.linear_1, nn.Linear)
    packed, _ = by_mlx_vlm(tmp_path, no_vision)
    llama_folder = str(sources.llama(tmp_path / "llama"))
    convert(str(packed), tmp_path / "b", connector="mlp", decoder=llama_folder)
    # Nothing that is packed was taken.
    assert load_config(tmp_path / "b").quantization is None


def test_inspect_counts_the_numbers_and_not_the_integers(tmp_path: Path) -> None:
    packed, twin = by_mlx_vlm(tmp_path)
    convert(str(packed), tmp_path / "out")
    convert(str(twin), tmp_path / "float")
    facts, plain = (describe(str(tmp_path / name)) for name in ("out", "float"))
    assert facts["parameters"] == plain["parameters"]
    assert facts["config"]["quantization"] == PACKING | {"mode": "affine"}


def change(folder: Path, config: Any = None, drop: str | None = None) -> Path:
    """The folder with other fields in its config, or without a tensor."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    if drop:
        file = folder / "model.safetensors"
        tensors = dict(mx.load(str(file)))
        mx.eval(tensors)
        del tensors[drop]
        mx.save_safetensors(str(file), tensors)
    return folder


Q = "model.layers.1.self_attn.q_proj"


def packing(**fields: Any) -> dict[str, Any]:
    return dict.fromkeys(("quantization", "quantization_config"), PACKING | fields)


@pytest.mark.parametrize(
    ("config", "drop", "message"),
    [
        (
            None,
            f"{Q}.scales",
            f"'{Q}' is packed, but '{Q}.scales' is missing; the sour",
        ),
        (
            None,
            f"{Q}.biases",
            f"'{Q}' is packed, but '{Q}.biases' is missing; the sour",
        ),
        (
            None,
            f"{Q}.weight",
            f"'{Q}' is packed, but '{Q}.weight' is missing; the sour",
        ),
        (
            packing(bits=8),
            None,
            "are not packed with 8 bits in groups of 32; config.json",
        ),
        (packing(group_size=64), None, "are not packed with 4 bits in groups of 64"),
        (
            packing(group_size=64, bits=2),
            None,
            r"shape \[\d+, 128\], which does not make",
        ),
        (
            packing(**{Q: {"group_size": 32, "bits": 8}}),
            None,
            "are not packed with 8 bits in groups of 32; config.json",
        ),
        (
            {"quantization": {"quant_method": "awq", "bits": 4, "group_size": 128}},
            None,
            r"is quantized \(quantization in config.json\); convert the checkpoint",
        ),
        (
            {"quantization": None, "quantization_config": {"quant_method": "gptq"}},
            None,
            r"is quantized \(quantization_config in config.json\); convert the",
        ),
        (
            {"quantization": None, "quantization_config": None},
            None,
            "'lm_head' is packed, but config.json does not say how; get it again",
        ),
    ],
)
def test_what_is_not_packed_as_the_config_says_is_refused(
    config: Any, drop: str | None, message: str, tmp_path: Path
) -> None:
    folder, _ = by_mlx_lm(tmp_path / "in", LLAMA, PACKING)
    change(folder, config, drop)
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(str(folder), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


MATRIX, VECTOR, NUMBER = mx.zeros((2, 8)), mx.zeros(8), mx.array(1.0)


def save(folder: Path, changes: dict[str, mx.array]) -> Path:
    """The folder with these tensors besides, or in the place of its own."""
    file = folder / "model.safetensors"
    tensors = dict(mx.load(str(file))) | changes
    mx.eval(tensors)
    mx.save_safetensors(str(file), tensors)
    return folder


@pytest.mark.parametrize(
    ("leaf", "kind"),
    [
        ("weight", mx.float32),
        ("weight", mx.int32),
        ("scales", mx.int8),
        ("biases", mx.uint32),
    ],
)
def test_what_is_packed_is_of_the_types_that_load(
    leaf: str, kind: mx.Dtype, tmp_path: Path
) -> None:
    folder, _ = by_mlx_lm(tmp_path / "in", LLAMA, PACKING)
    tensors = dict(mx.load(str(folder / "model.safetensors")))
    save(folder, {f"{Q}.{leaf}": tensors[f"{Q}.{leaf}"].astype(kind)})
    message = rf"'{Q}.{leaf}' holds {kind}, expected mlx.core.\w+ .*of a packed module"
    with pytest.raises(CheckpointError, match=message):
        convert(str(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("weight", "scales", "biases"),
    [
        (NUMBER, NUMBER, NUMBER),
        (VECTOR, NUMBER, NUMBER),
        (VECTOR, VECTOR[:2], VECTOR[:2]),
        (MATRIX, NUMBER, NUMBER),
        (MATRIX, MATRIX[:, :2], MATRIX[:1, :2]),
    ],
)
def test_what_is_packed_is_of_shapes_that_fit(
    weight: mx.array, scales: mx.array, biases: mx.array, tmp_path: Path
) -> None:
    folder, _ = by_mlx_lm(tmp_path / "in", LLAMA, PACKING)
    parts = {"weight": weight.astype(mx.uint32), "scales": scales, "biases": biases}
    save(folder, {f"{Q}.{leaf}": x for leaf, x in parts.items()})
    message = (
        rf"'{Q}' has weights \[.*\], scales and biases \[.*\], which are not packed"
    )
    with pytest.raises(CheckpointError, match=message):
        convert(str(folder), tmp_path / "out")


@pytest.mark.parametrize("leaf", ["weight", "scales", "biases"])
def test_a_tied_head_is_packed_as_its_embedding_is(leaf: str, tmp_path: Path) -> None:
    folder, reference = by_mlx_lm(tmp_path / "in", QWEN3, PACKING)
    tensors = dict(mx.load(str(folder / "model.safetensors")))
    leaves = ("weight", "scales", "biases")
    head = {f"lm_head.{x}": tensors[f"model.embed_tokens.{x}"] for x in leaves}
    report = convert(str(save(folder, head)), tmp_path / "out")
    assert report.dropped == {str(folder): tuple(sorted(head))}
    logits = load_model(tmp_path / "out")(TOKENS)
    assert difference(logits, reference(TOKENS)) <= TOLERANCE
    name = f"lm_head.{leaf}"
    save(folder, {name: head[name] + 1})
    with pytest.raises(CheckpointError, match=r"config.json ties 'lm_head.weight' to"):
        convert(str(folder), tmp_path / "other")


def test_other_bits_than_there_are_is_named(tmp_path: Path) -> None:
    folder, _ = by_mlx_lm(tmp_path / "in", LLAMA, PACKING)
    change(folder, packing(bits=7))
    with pytest.raises(ConfigError, match=r"QuantizationConfig.bits: 7 is not one of"):
        convert(str(folder), tmp_path / "out")


def test_fused_weights_are_not_torn_apart(tmp_path: Path) -> None:
    folder, _ = by_mlx_lm(tmp_path / "in", LLAMA, PACKING)
    file = folder / "model.safetensors"
    tensors = dict(mx.load(str(file)))
    for i in range(2):
        mlp = f"model.layers.{i}.mlp."
        attention = f"model.layers.{i}.self_attn."
        for leaf in ("weight", "scales", "biases"):
            parts = [tensors.pop(f"{mlp}{x}_proj.{leaf}") for x in ("gate", "up")]
            tensors[f"{mlp}gate_up_proj.{leaf}"] = mx.concatenate(parts)
            parts = [tensors.pop(f"{attention}{x}_proj.{leaf}") for x in "qkv"]
            tensors[f"{attention}qkv_proj.{leaf}"] = mx.concatenate(parts)
    mx.eval(tensors)
    mx.save_safetensors(str(file), tensors)
    change(folder, {"model_type": "phi3", "pad_token_id": 0})
    message = (
        "'model.layers.0.mlp.gate_up_proj.weight' is packed and cannot be made into "
        "'decoder.layers.0.mlp.gate_proj.weight', which is laid out in another way"
    )
    with pytest.raises(CheckpointError, match=message):
        convert(str(folder), tmp_path / "out")


def test_parts_that_are_packed_in_two_ways_go_together(tmp_path: Path) -> None:
    packing = {"group_size": 64, "bits": 8}
    folder, _ = by_mlx_lm(tmp_path / "in", LLAMA, packing)
    packed, twin = by_mlx_vlm(tmp_path)
    convert(str(packed), tmp_path / "out", decoder=str(folder))
    model = load_model(tmp_path / "out")
    assert model.decoder.layers[0].self_attn.q_proj.bits == 8
    assert model.connector.linear_1.bits == PACKING["bits"]
    convert(str(twin), tmp_path / "float", decoder=str(folder))
    assert difference(seen(model), seen(load_model(tmp_path / "float"))) <= TOLERANCE


@pytest.mark.parametrize("config", [LLAMA, OLMOE])
def test_modules_packed_in_ways_of_their_own_compute_what_mlx_lm_does(
    config: dict[str, Any], tmp_path: Path
) -> None:
    """As mlx-lm's mixed recipes write them, one module left as it is."""
    library: Any = LIBRARIES[config["model_type"]]
    model = library.Model(library.ModelArgs.from_dict(config))
    fresh(model)
    mixed = mixed_quant_predicate_builder("mixed_3_6", model, 32)
    kept = "model.layers.1.self_attn.o_proj"
    model, written = quantize_model(
        model,
        config,
        32,
        4,
        quant_predicate=lambda path, module: path != kept and mixed(path, module),
    )
    # mlx-lm's loader knows this, too.
    written["quantization"][kept] = False
    assert written["quantization"]["lm_head"]["bits"] == 6
    tensors = dict(tree_flatten(model.parameters()))
    folder = sources.write(tmp_path / "in", written, tensors)
    convert(str(folder), tmp_path / "out")
    loaded = load_model(tmp_path / "out")
    assert difference(loaded(TOKENS), model(TOKENS)) <= TOLERANCE
    block = loaded.decoder.layers[0].self_attn
    assert (block.q_proj.bits, loaded.decoder.lm_head.bits) == (3, 6)
    assert type(loaded.decoder.layers[1].self_attn.o_proj) is nn.Linear
    # And from our own format, which writes the ways in the same form.
    convert(str(tmp_path / "out"), tmp_path / "again")
    assert load_config(tmp_path / "again") == load_config(tmp_path / "out")


def test_a_packed_decoder_is_not_upcycled(tmp_path: Path) -> None:
    folder, _ = by_mlx_lm(tmp_path / "in", LLAMA, PACKING)
    with pytest.raises(ConfigError, match="a quantized decoder cannot be upcycled"):
        convert(str(folder), tmp_path / "out", upcycle="experts=4,every=2")


def test_a_dense_decoder_beside_packed_parts_is_upcycled(tmp_path: Path) -> None:
    packed, _ = by_mlx_vlm(tmp_path)
    decoder = str(sources.write(tmp_path / "llama", LLAMA, dense_llama()))
    convert(str(packed), tmp_path / "dense", decoder=decoder)
    spec = "experts=4,every=1"
    convert(str(packed), tmp_path / "out", decoder=decoder, upcycle=spec)
    sparse, dense = load_model(tmp_path / "out"), load_model(tmp_path / "dense")
    assert isinstance(sparse.connector.linear_1, nn.QuantizedLinear)
    assert difference(seen(sparse), seen(dense)) <= TOLERANCE


def dense_llama() -> Tensors:
    prefix = "language_model."
    return {
        name.removeprefix(prefix): x
        for name, x in llava_tensors().items()
        if name.startswith(prefix)
    }


def test_a_folder_of_ours_must_be_packed_as_its_config_says(tmp_path: Path) -> None:
    folder, _ = by_mlx_lm(tmp_path / "in", LLAMA, PACKING)
    convert(str(folder), tmp_path / "out")
    path = tmp_path / "out/config.json"
    text = path.read_text()
    for old, new, message in (
        (
            '"bits": 4',
            '"bits": 8',
            r"has shape \[\d+, 8\], config.json says \[\d+, 16\]",
        ),
        ('"group_size": 32', '"group_size": 64', r"config.json says \[\d+, 1\]"),
        # As long, so that the manifest's sizes still fit.
        ('"mode": "affine"', '"mode": "mxfp4" ', r"tensor\(s\) unknown, e.g. .*biases"),
        (
            '"group_size": 32,\n    ',
            '"group_size": 128,\n   ',
            r"config.json packs .* does not fit",
        ),
    ):
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises(CheckpointError, match=message):
            load_model(tmp_path / "out")


def test_a_convolution_that_may_be_either_way_is_refused(tmp_path: Path) -> None:
    clip = CLIP | {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
    tensors = sources.clip_tensors()
    name = "vision_model.embeddings.patch_embedding.weight"
    tensors[name] = mx.zeros((8, 3, 3, 3))
    position = "vision_model.embeddings.position_embedding.weight"
    tensors[position] = mx.zeros((17, 8))
    config = clip | {"patch_size": 3, "image_size": 12}
    folder = sources.write(tmp_path / "in", config, tensors)
    with pytest.raises(CheckpointError, match="may be laid out in PyTorch's way or in"):
        convert(str(folder), tmp_path / "out")
