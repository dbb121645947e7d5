"""AuroraCap computes what its parts compute in transformers and plain PyTorch.

transformers has CLIP and Llama; the projector is the sequence that xtuner's
``ProjectorModel`` builds. Without its token merging, which is off at a ratio of 1.0.
"""

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
import llava_oracle  # noqa: E402
from huggingface_hub import HfApi, ModelInfo  # noqa: E402
from llava_oracle import IMAGE_ID, SIDE, VOCABULARY, WIDTH  # noqa: E402
from parity import save  # noqa: E402

from mm1_mlx import hub  # noqa: E402
from mm1_mlx.checkpoint import load_config  # noqa: E402
from mm1_mlx.convert import Source, convert, describe, detect_format  # noqa: E402
from mm1_mlx.errors import CheckpointError, ConfigError  # noqa: E402

pytestmark = pytest.mark.reference

# As DFN5B's ViT-H/14 has it, but small.
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 7,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 3e-6,
}
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
PROJECTOR = {
    "model_type": "projector",
    "architectures": ["ProjectorModel"],
    "auto_map": {"AutoModel": "modeling_projector.ProjectorModel"},
    "visual_hidden_size": WIDTH,
    "llm_hidden_size": WIDTH,
    "depth": 2,
    "hidden_act": "gelu",
    "bias": True,
    "torch_dtype": "float32",
}


def write(folder: Path, shards: int = 1, **projector: Any) -> tuple[Path, Any]:
    """The checkpoint as the hub holds it, and its forward pass."""
    clip, decoder = llava_oracle.clip(VISION), llava_oracle.llama(TEXT)
    mlp = llava_oracle.mlp(WIDTH, WIDTH)
    llava_oracle.renew((clip, decoder, mlp), 2)
    save(folder, decoder.state_dict(), {"model_type": "llama"} | TEXT, shards)
    tower = llava_oracle.tower(clip, "")
    config = {"model_type": "clip_vision_model"} | VISION
    save(folder / "visual_encoder", tower, config, shards)
    state = {f"model.{name}": tensor for name, tensor in mlp.state_dict().items()}
    save(folder / "projector", state, PROJECTOR | projector)
    forward = llava_oracle.forward_of(
        lambda pixels: llava_oracle.project(clip, mlp, pixels, -2), decoder, IMAGE_ID
    )
    return folder, forward


def test_logits_and_greedy_tokens_equal_the_oracle(tmp_path: Path) -> None:
    folder, forward = write(tmp_path / "in", shards=2)
    llava_oracle.check(folder, forward)


def test_every_swap_of_two_rules_is_noticed(tmp_path: Path) -> None:
    folder, _ = write(tmp_path / "in")
    assert llava_oracle.check_swaps(folder) > 100


def test_the_config_is_the_source_s(tmp_path: Path) -> None:
    folder, _ = write(tmp_path / "in")
    convert(str(folder), tmp_path / "out")
    made = load_config(tmp_path / "out")
    assert made.vision is not None
    assert made.vision.layer_norm_eps == 3e-6
    assert made.vision.hidden_act == "quick_gelu"
    assert (made.vision.feature_layer, made.vision.drop_cls) == (-2, True)
    assert made.connector is not None
    assert made.connector.to_dict()["hidden_act"] == "gelu"
    assert made.image is not None
    assert (made.image.size, made.image.resize) == (SIDE, "crop")
    assert made.image.crop_rounding == "down"
    assert made.prompt is not None
    assert made.prompt.template == "auroracap"


def test_both_folders_count_in_the_size(tmp_path: Path) -> None:
    folder, _ = write(tmp_path / "in")
    sizes = [path.stat().st_size for path in folder.rglob("*.safetensors")]
    assert len(sizes) == 3
    assert describe(str(folder)).bytes == sum(sizes)


def test_a_llama_with_neither_of_the_folders_is_a_llama(tmp_path: Path) -> None:
    folder, _ = write(tmp_path / "in")
    for name in ("visual_encoder", "projector"):
        (folder / name / "config.json").unlink()
    with Source(str(folder)) as source:
        assert detect_format(source).__name__.endswith("llama_hf")
        assert not any("/" in name for name in source.tensors)


@pytest.mark.parametrize(
    ("lost", "left"),
    [("visual_encoder", "projector"), ("projector", "visual_encoder")],
)
def test_one_of_the_folders_alone_makes_no_blind_llama(
    lost: str, left: str, tmp_path: Path
) -> None:
    folder, _ = write(tmp_path / "in")
    (folder / lost / "config.json").unlink()
    message = f"is incomplete: it lacks {lost}/config.json, .* parts, {left}; get it"
    for act in (describe, lambda name: convert(name, tmp_path / "out")):
        with pytest.raises(CheckpointError, match=message):
            act(str(folder))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": 3}, "ProjectorConfig.depth: 3 is not supported; supported: 2"),
        ({"visual_hidden_size": 64}, "visual_hidden_size: 64 is not supported; supp"),
        ({"llm_hidden_size": 64}, "llm_hidden_size: 64 is not supported; supported"),
        ({"hidden_act": "relu"}, "hidden_act: activation 'relu' is not supported"),
        ({"surprise": 1}, r"field\(s\) \['surprise'\] are not known here"),
        ({"model_type": "qformer"}, "model_type: 'qformer' is not supported"),
    ],
)
def test_what_is_not_understood_is_named(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder, _ = write(tmp_path / "in", **fields)
    with pytest.raises(ConfigError, match=message):
        convert(str(folder), tmp_path / "out")


def test_a_missing_part_of_a_folder_is_named(tmp_path: Path) -> None:
    folder, _ = write(tmp_path / "in", shards=2)
    (folder / "visual_encoder/model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"visual_encoder lacks 1 of 2 weight fi"):
        convert(str(folder), tmp_path / "out")
    (folder / "projector/model.safetensors").unlink()
    (folder / "visual_encoder/model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="projector has no safetensors weights"):
        convert(str(folder), tmp_path / "out")


def test_a_folder_that_is_a_link_out_of_the_checkpoint_is_refused(
    tmp_path: Path,
) -> None:
    folder, _ = write(tmp_path / "in")
    (folder / "projector").rename(tmp_path / "elsewhere")
    (folder / "projector").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        convert(str(folder), tmp_path / "out")


@pytest.mark.parametrize("name", ["../config.json", "projector/../x", "a//b", "/a"])
def test_a_name_that_leads_out_is_refused(name: str, tmp_path: Path) -> None:
    folder, _ = write(tmp_path / "in")
    with (
        Source(str(folder)) as source,
        pytest.raises(CheckpointError, match="is not allowed"),
    ):
        source.file(name)


def test_of_a_repository_only_these_folders_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub lists what lies in a local checkpoint, and more; copies are counted."""
    folder, _ = write(tmp_path / "in", shards=2)
    files = [str(path.relative_to(folder)) for path in folder.rglob("*.*")]
    files = [name for name in files if (folder / name).is_file()]
    others = [
        *("onnx/config.json", "onnx/model.safetensors", "projector/code.py"),
        *("projector/deep/config.json", "projector/..", "consolidated.safetensors"),
    ]
    siblings = [{"rfilename": name, "size": 1000} for name in (*files, *others)]
    info = ModelInfo(id="a/b", sha="1" * 40, siblings=siblings, tags=[])
    fetched: list[set[str]] = []

    def snapshot(_: str, **options: Any) -> str:
        from huggingface_hub.utils import filter_repo_objects

        chosen = filter_repo_objects(
            [*files, *others],
            allow_patterns=options["allow_patterns"],
            ignore_patterns=options.get("ignore_patterns"),
        )
        fetched.append(set(chosen))
        return str(folder)

    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: info)
    monkeypatch.setattr("mm1_mlx.hub.snapshot_download", snapshot)
    with Source("a/b") as source:
        small = set().union(*fetched)
        assert small == {name for name in files if name.endswith(".json")}
        fetched.clear()
        assert detect_format(source).__name__.endswith("auroracap")
        assert any(name.startswith("projector/model.0") for name in source.tensors)
    assert set().union(*fetched) == set(files)
    shards = [name for name in files if name.endswith(".safetensors")]
    assert describe("a/b").bytes == 1000 * len(shards)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    assert hub.describe("a/b").bytes == 2000
