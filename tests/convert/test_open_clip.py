"""open_clip's CLIP computes what its source says.

open_clip itself needs torchvision. Its weights are made here by OpenAI's layout of torch
modules (``nn.MultiheadAttention``, ``nn.Sequential``), which is the first oracle; the
second is transformers' CLIPModel with the same weights under its own names.
"""

import json
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from huggingface_hub import HfApi, ModelInfo
from huggingface_hub.errors import RemoteEntryNotFoundError
from numpy.typing import NDArray

torch = pytest.importorskip("torch")
from parity import (  # noqa: E402
    TOLERANCE,
    State,
    difference,
    pictures,
    reinitialise,
    to_torch,
    undetected_swaps,
)
from safetensors.torch import save_file  # noqa: E402
from torch import nn  # noqa: E402
from transformers import CLIPConfig, CLIPModel  # noqa: E402

from mm1_mlx import hub  # noqa: E402
from mm1_mlx.checkpoint import load_model  # noqa: E402
from mm1_mlx.config import ImageConfig, MM1Config  # noqa: E402
from mm1_mlx.convert import Source, convert, detect_format  # noqa: E402
from mm1_mlx.convert.shards import weight_files  # noqa: E402
from mm1_mlx.errors import CheckpointError, ConfigError  # noqa: E402
from mm1_mlx.models import MM1  # noqa: E402
from mm1_mlx.presets import CLIP_MEAN, CLIP_STD  # noqa: E402

pytestmark = pytest.mark.reference

WIDTH, TEXT_WIDTH, SHARED = 32, 32, 32
MODEL = {
    "embed_dim": SHARED,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": 28,
        "layers": 2,
        "width": WIDTH,
        "head_width": 8,
        "mlp_ratio": 1.5,
        "patch_size": 14,
    },
    "text_cfg": {
        "context_length": 8,
        "vocab_size": 50,
        "width": TEXT_WIDTH,
        "heads": 4,
        "layers": 2,
        "mlp_ratio": 1.5,
    },
}
PICTURES = {
    "mean": list(CLIP_MEAN),
    "std": list(CLIP_STD),
    "interpolation": "bicubic",
    "resize_mode": "squash",
}
# The text's end has the highest id; zeros fill the places after it.
TOKENS = [[3, 40, 9, 49, 0, 0, 0, 0], [5, 49, 0, 0, 0, 0, 0, 0], [7] * 7 + [49]]


class QuickGELU(nn.Module):
    def forward(self, x: Any) -> Any:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        hidden = int(1.5 * width)
        layers = OrderedDict(c_fc=nn.Linear(width, hidden), gelu=act())
        self.mlp = nn.Sequential(layers | {"c_proj": nn.Linear(hidden, width)})

    def forward(self, x: Any, mask: Any = None) -> Any:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Blocks(nn.Module):
    def __init__(self, *arguments: Any) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(*arguments) for _ in range(2))

    def forward(self, x: Any, mask: Any = None) -> Any:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Vision(nn.Module):
    def __init__(self, act: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, 14, 14, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(WIDTH))
        self.positional_embedding = nn.Parameter(torch.zeros(5, WIDTH))
        self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.transformer = Blocks(WIDTH, 4, act)
        self.proj = nn.Parameter(torch.zeros(WIDTH, SHARED))

    def forward(self, pixels: Any) -> Any:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        cls = self.class_embedding.expand(len(x), 1, -1)
        x = torch.cat([cls, x], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x)))


class Reference(nn.Module):
    """OpenAI's CLIP as open_clip lays it out."""

    def __init__(self, act: type[nn.Module]) -> None:
        super().__init__()
        self.visual = Vision(act)
        self.token_embedding = nn.Embedding(50, TEXT_WIDTH)
        self.positional_embedding = nn.Parameter(torch.zeros(8, TEXT_WIDTH))
        self.transformer = Blocks(TEXT_WIDTH, 4, act)
        self.ln_final = nn.LayerNorm(TEXT_WIDTH)
        self.text_projection = nn.Parameter(torch.zeros(TEXT_WIDTH, SHARED))
        self.logit_scale = nn.Parameter(torch.zeros([]))

    def texts(self, tokens: Any) -> Any:
        x = self.token_embedding(tokens) + self.positional_embedding
        mask = torch.full((8, 8), float("-inf")).triu(1)
        x = self.ln_final(self.transformer(x, mask))
        return x[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection

    def images(self, pixels: Any) -> Any:
        return self.visual(pixels)[:, 0] @ self.visual.proj


def reference(quick_gelu: bool = True, seed: int = 0) -> Reference:
    model = Reference(QuickGELU if quick_gelu else nn.GELU).eval()
    reinitialise(model, seed)
    return model


def write(
    folder: Path,
    state: State,
    pickled: bool = False,
    preprocess: Any = PICTURES,
    **model: Any,
) -> str:
    folder.mkdir(parents=True)
    config = {"model_cfg": MODEL | model, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    state = {name: x.detach().clone().contiguous() for name, x in state.items()}
    if pickled:
        torch.save(state, folder / "open_clip_pytorch_model.bin")
    else:
        save_file(state, folder / "open_clip_model.safetensors")
    return str(folder)


def everything(model: MM1, pixels: NDArray[np.float32]) -> list[NDArray[Any]]:
    """Our features, and our embeddings of the picture and of the texts."""
    texts = model.text(mx.array(TOKENS))
    x = mx.array(pixels)
    return [np.array(y) for y in (model.vision(x), model.vision.project(x), texts)]


def their_everything(model: Reference, pixels: NDArray[np.float32]) -> list[Any]:
    with torch.no_grad():
        x = to_torch(pixels)
        outputs = (
            model.visual(x)[:, 1:],
            model.images(x),
            model.texts(torch.tensor(TOKENS)),
        )
        return [y.numpy() for y in outputs]


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("custom_text", [False, True])
def test_both_towers_equal_the_reference(
    quick_gelu: bool, pickled: bool, custom_text: bool, tmp_path: Path
) -> None:
    model = reference(quick_gelu)
    state = dict(model.state_dict())
    if custom_text:
        plain = ("visual.", "logit_scale")
        state = {n if n.startswith(plain) else f"text.{n}": x for n, x in state.items()}
    options = {"quick_gelu": quick_gelu, "custom_text": custom_text}
    folder = write(tmp_path / "in", state, pickled, **options)
    report = convert(folder, tmp_path / "out")
    assert report.parts["text"] == (folder, "open_clip")
    assert report.dropped == {}
    ours = load_model(tmp_path / "out")
    assert ours.text.logit_scale.item() == model.logit_scale.item()
    results = [everything(ours, pixels) for pixels in pictures(28)]
    for result, pixels in zip(results, pictures(28), strict=True):
        for part, expected in zip(result, their_everything(model, pixels), strict=True):
            assert difference(part, expected) <= TOLERANCE
    assert difference(results[0][1], results[1][1]) > 0.1


def hugging_face(state: State) -> State:
    """The same weights as transformers calls them, by hand."""
    named = {
        "logit_scale": state["logit_scale"],
        "visual_projection.weight": state["visual.proj"].T,
        "text_projection.weight": state["text_projection"].T,
    }
    vision, text = "vision_model.", "text_model."
    for theirs, name in (
        (f"{vision}embeddings.class_embedding", "visual.class_embedding"),
        (f"{vision}embeddings.patch_embedding.weight", "visual.conv1.weight"),
        (
            f"{vision}embeddings.position_embedding.weight",
            "visual.positional_embedding",
        ),
        (f"{text}embeddings.token_embedding.weight", "token_embedding.weight"),
        (f"{text}embeddings.position_embedding.weight", "positional_embedding"),
    ):
        named[theirs] = state[name]
    norms = {
        f"{vision}pre_layrnorm": "visual.ln_pre",
        f"{vision}post_layernorm": "visual.ln_post",
        f"{text}final_layer_norm": "ln_final",
    }
    leaves = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "self_attn.out_proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    for kind in ("weight", "bias"):
        for theirs, name in norms.items():
            named[f"{theirs}.{kind}"] = state[f"{name}.{kind}"]
        for tower, prefix in ((vision, "visual."), (text, "")):
            for i in range(2):
                block = f"{prefix}transformer.resblocks.{i}."
                layer = f"{tower}encoder.layers.{i}."
                for theirs, name in leaves.items():
                    named[f"{layer}{theirs}.{kind}"] = state[f"{block}{name}.{kind}"]
                fused = state[f"{block}attn.in_proj_{kind}"]
                for place, x in enumerate("qkv"):
                    part = fused[place * WIDTH : (place + 1) * WIDTH]
                    named[f"{layer}self_attn.{x}_proj.{kind}"] = part
    return named


def test_logits_equal_transformers_with_the_same_weights(tmp_path: Path) -> None:
    model = reference()
    config = CLIPConfig(
        projection_dim=SHARED,
        vision_config={
            "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 28, "patch_size": 14,
        },
        text_config={
            "hidden_size": TEXT_WIDTH, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "vocab_size": 50, "max_position_embeddings": 8,
            "eos_token_id": 49,
        },
    )  # fmt: skip
    theirs = CLIPModel(config).eval()
    theirs.load_state_dict(hugging_face(model.state_dict()))
    convert(write(tmp_path / "in", model.state_dict()), tmp_path / "out")
    ours = load_model(tmp_path / "out")
    for pixels in pictures(28):
        _, images, texts = (mx.array(x) for x in everything(ours, pixels))
        images, texts = (
            x / mx.linalg.norm(x, axis=-1, keepdims=True) for x in (images, texts)
        )
        logits = np.array(mx.exp(ours.text.logit_scale) * images @ texts.T)
        with torch.no_grad():
            output = theirs(torch.tensor(TOKENS), to_torch(pixels))
        assert difference(logits, output.logits_per_image.numpy()) <= TOLERANCE


def test_every_swap_of_two_rules_is_noticed(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", reference().state_dict())
    convert(folder, tmp_path / "out")
    pixels = pictures(28)[0]

    def results(model: MM1) -> NDArray[np.float32]:
        features, images, texts = everything(model, pixels)
        return np.concatenate([features[0], images, texts]).ravel()

    count, unnoticed = undetected_swaps(Path(folder), tmp_path / "out", results)
    assert count > 150
    # A key's bias adds the same to all scores of a query, which softmax does not see.
    (pair,) = unnoticed
    assert all("k_proj.bias" in name for name in pair)


def read(
    folder: Path, *, name: str = "in", preprocess: Any = PICTURES, **model: Any
) -> MM1Config:
    with Source(write(folder / name, {}, preprocess=preprocess, **model)) as source:
        return detect_format(source).config(source)


UNSAID = {key: x for key, x in MODEL.items() if key != "quick_gelu"}


@pytest.mark.parametrize(
    ("name", "act", "resize"),
    [
        ("DFN2B-CLIP-ViT-B-16", "quick_gelu", "crop"),
        ("DFN2B-CLIP-ViT-L-14", "quick_gelu", "crop"),
        ("DFN2B-CLIP-ViT-L-14-39B", "gelu", "crop"),
        ("DFN5B-CLIP-ViT-H-14", "quick_gelu", "squash"),
        ("DFN5B-CLIP-ViT-H-14-378", "quick_gelu", "squash"),
        ("CLIP-ViT-H-14-laion2B-s32B-b79K", "gelu", "crop"),
    ],
)
def test_known_repositories_are_what_open_clip_s_table_says(
    name: str, act: str, resize: str, tmp_path: Path
) -> None:
    """Where the config does not say otherwise."""
    folder = Path(write(tmp_path / name, {}))
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": UNSAID}))
    with Source(str(folder)) as source:
        config = detect_format(source).config(source)
    assert config.vision is not None
    assert config.text is not None
    assert config.image is not None
    assert config.vision.hidden_act == config.text.hidden_act == act
    assert config.image.resize == resize
    said = read(tmp_path / "said", name=name, quick_gelu=act == "gelu").vision
    assert said is not None
    assert said.hidden_act != act


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("DFN5B-CLIP-ViT-H-14", True),
        ("DFN5B-CLIP-ViT-H-14/", True),
        ("DFN5B-CLIP-ViT-H-14/.", True),
        ("models--apple--DFN5B-CLIP-ViT-H-14/snapshots/0123abc", True),
        ("models--apple--DFN5B-CLIP-ViT-H-14/other/0123abc", False),
        ("DFN5B-CLIP-ViT-H-14/mine", False),
        ("my-clip", False),
    ],
)
def test_a_repository_s_name_is_found_in_its_place(
    place: str, told: bool, tmp_path: Path
) -> None:
    """And in a folder of another name the model is as open_clip takes it: plain."""
    folder = Path(write(tmp_path / "made", {}))
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": UNSAID}))
    # Path has no slash or dot at its end.
    moved = Path(f"{tmp_path}/{place}")
    moved.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(moved)
    with Source(f"{tmp_path}/{place}") as source:
        config = detect_format(source).config(source)
    assert config.vision is not None
    assert config.image is not None
    assert config.vision.hidden_act == ("quick_gelu" if told else "gelu")
    assert config.image.resize == ("squash" if told else "crop")


def test_the_config_says_sizes_eps_and_pictures(tmp_path: Path) -> None:
    pictures = PICTURES | {"resize_mode": "shortest", "mean": [0.5] * 3}
    config = read(tmp_path, preprocess=pictures | {"size": [28, 28], "mode": "RGB"})
    vision, text = config.vision, config.text
    assert vision is not None
    assert text is not None
    assert (vision.num_attention_heads, vision.intermediate_size) == (4, 48)
    assert (vision.layer_norm_eps, text.layer_norm_eps) == (1e-5, 1e-5)
    assert vision.interpolation == "bicubic_antialias"
    assert (vision.projection_size, text.projection_size) == (SHARED, SHARED)
    assert (text.eos_token_id, text.pad_token_id) == (None, 0)
    assert config.image == ImageConfig(
        size=28,
        resize="crop",
        mean=(0.5, 0.5, 0.5),
        std=CLIP_STD,
        crop_rounding="even",
    )


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        (
            "vision_cfg",
            {"timm_model_name": "vit"},
            r"\['timm_model_name'\] are not known",
        ),
        ("vision_cfg", {"attentional_pool": True}, r"\['attentional_pool'\] are not"),
        ("vision_cfg", {"ls_init_value": 1e-5}, r"\['ls_init_value'\] are not known"),
        ("vision_cfg", {"pool_type": "avg"}, "pool_type: 'avg' is not supported"),
        ("vision_cfg", {"layers": [3, 4, 6, 3]}, "layers: expected an integer"),
        (
            "text_cfg",
            {"hf_model_name": "roberta"},
            r"\['hf_model_name'\] are not known",
        ),
        ("text_cfg", {"no_causal_mask": True}, r"\['no_causal_mask'\] are not known"),
        ("text_cfg", {"pool_type": "last"}, "pool_type: 'last' is not supported"),
        ("text_cfg", {"pool_type": "eos"}, "field 'eos_id' is missing"),
        ("text_cfg", {"proj_type": "none"}, "proj_type: 'none' is not supported"),
        ("preprocess", {"interpolation": "bilinear"}, "'bilinear' is not supported"),
        ("preprocess", {"resize_mode": "longest"}, "resize_mode: 'longest' is not"),
        ("preprocess", {"size": [32, 32]}, r"size: \[32, 32\] is not supported"),
        ("model", {"init_logit_bias": -10}, r"\['init_logit_bias'\] are not known"),
        (
            "vision_cfg",
            {"mlp_ratio": float("inf")},
            "mlp_ratio: inf is not a number ab",
        ),
        (
            "vision_cfg",
            {"mlp_ratio": float("nan")},
            "mlp_ratio: nan is not a number ab",
        ),
        (
            "vision_cfg",
            {"mlp_ratio": 10**400},
            "mlp_ratio: 1000* is not a number above",
        ),
        ("text_cfg", {"mlp_ratio": "4"}, "mlp_ratio: '4' is not a number above 0"),
        ("vision_cfg", {"mlp_ratio": 0}, "mlp_ratio: 0 is not a number above 0"),
    ],
)
def test_other_layouts_are_refused_by_name(
    section: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {section: MODEL.get(section, {}) | fields}  # type: ignore[operator]
    if section == "model":
        options = fields
    elif section == "preprocess":
        options["preprocess"] = PICTURES | fields
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, **options)


def test_beside_a_hugging_face_config_that_one_is_read(tmp_path: Path) -> None:
    """Apple's DFN5B has both: one format, which still squashes."""
    folder = Path(write(tmp_path / "in", {}))
    config = {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14}
    (folder / "config.json").write_text(json.dumps(config))
    with Source(str(folder)) as source:
        format = detect_format(source)
        image = format.config(source).image
    assert format.__name__.endswith("clip_hf")
    assert image is not None
    assert image.resize == "squash"


AIM = {
    "img_size": 28,
    "patch_size": 14,
    "embed_dim": 32,
    "num_blocks": 1,
    "num_heads": 4,
}


@pytest.mark.parametrize(
    ("other", "name"), [({"model_type": "clip"}, "clip_hf"), (AIM, "aim")]
)
def test_a_config_that_says_more_is_in_one_format_alone(
    other: dict[str, Any], name: str, tmp_path: Path
) -> None:
    folder = Path(write(tmp_path / "in", {}))
    (folder / "config.json").write_text(json.dumps({"model_cfg": MODEL} | other))
    with Source(str(folder)) as source:
        assert detect_format(source).__name__.endswith(name)


def test_a_text_tower_that_ends_by_a_token_says_which(tmp_path: Path) -> None:
    text = {**MODEL["text_cfg"], "pool_type": "eos", "eos_id": 7}  # type: ignore[dict-item]
    config = read(tmp_path, text_cfg=text)
    assert config.text is not None
    assert config.text.eos_token_id == 7


def test_a_bias_of_logits_is_refused_with_its_tensor(tmp_path: Path) -> None:
    state = reference().state_dict() | {"logit_bias": torch.zeros(1)}
    folder = write(tmp_path / "in", state)
    with pytest.raises(CheckpointError, match=r"no rule, e.g. \['logit_bias'\]"):
        convert(folder, tmp_path / "out")


NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


@pytest.mark.parametrize(
    ("files", "weights"),
    [
        (("open_clip_config.json", *NAMES), NAMES[0]),
        (("open_clip_config.json", NAMES[1], "training_args.bin"), NAMES[1]),
        (
            ("config.json", "open_clip_config.json", *NAMES, "a.safetensors"),
            "a.safetensors",
        ),
    ],
)
def test_open_clip_s_weights_are_used_where_there_are_no_others(
    files: tuple[str, ...],
    weights: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in files:
        (tmp_path / name).touch()
    assert weight_files(tmp_path) == [weights]
    siblings = [{"rfilename": name, "size": 1000} for name in files]
    info = ModelInfo(id="a/b", sha="1" * 40, siblings=siblings, tags=[])
    asked: list[list[str]] = []

    def snapshot(_: str, allow_patterns: list[str], **__: Any) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: info)
    monkeypatch.setattr("mm1_mlx.hub.snapshot_download", snapshot)
    hub.download("a/b", pickles=True)
    assert asked == [[*hub.SMALL, weights]]
    assert hub.describe("a/b").bytes == 1000


def test_a_repository_with_open_clip_s_config_alone_is_of_no_type_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "open_clip_config.json"
    own.write_text(json.dumps({"model_cfg": MODEL}))

    def get(_: str, name: str) -> str:
        if name != own.name:
            response: Any = SimpleNamespace(headers={}, request=None)
            raise RemoteEntryNotFoundError("404", response=response)
        return str(own)

    monkeypatch.setattr("mm1_mlx.hub.hf_hub_download", get)
    assert hub.model_type("a/b") is None
