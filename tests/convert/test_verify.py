"""``verify`` finds a converted model equal to its source, and a changed one different."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

torch = pytest.importorskip("torch")
from parity import reinitialise  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from mm1_mlx.apps.cli import main  # noqa: E402
from mm1_mlx.checkpoint import verify_digests  # noqa: E402
from mm1_mlx.convert import convert  # noqa: E402
from mm1_mlx.convert.stages import ask_source  # noqa: E402
from mm1_mlx.convert.verify import PICTURE, verify  # noqa: E402
from mm1_mlx.errors import CheckpointError  # noqa: E402
from mm1_mlx.files import sha256  # noqa: E402
from mm1_mlx.runtime import TINY  # noqa: E402

pytestmark = pytest.mark.reference

SIDE = 28
TEXT = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "eos_token_id": 1,
}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": 7,
}
SIZES = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
PREPROCESSORS = {
    "llava": {"image_processor_type": "CLIPImageProcessor", **SIZES},
    "llava_next": {
        "image_processor_type": "LlavaNextImageProcessor",
        "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]],
        **SIZES,
    },
    "clip": {"image_processor_type": "CLIPImageProcessor", **SIZES},
}


def build(kind: str) -> Any:
    if kind == "llama":
        values = {k: v for k, v in TEXT.items() if k != "model_type"}
        config = AutoConfig.for_model("llama", **values)
        return AutoModelForCausalLM.from_config(config)
    if kind == "clip":
        text = {k: v for k, v in TEXT.items() if k != "model_type"}
        text["max_position_embeddings"] = 16
        return CLIPModel(CLIPConfig(text_config=text, vision_config=dict(VISION)))
    fields: dict[str, Any] = {
        "text_config": dict(TEXT),
        "vision_config": dict(VISION),
        "image_token_index": 2,
    }
    if kind == "llava":
        return LlavaForConditionalGeneration(LlavaConfig(**fields))
    pinpoints = PREPROCESSORS["llava_next"]["image_grid_pinpoints"]
    config = LlavaNextConfig(image_grid_pinpoints=pinpoints, **fields)
    return LlavaNextForConditionalGeneration(config)


@pytest.fixture
def saved(tmp_path: Path, byte_folder: Path) -> Any:
    """A function: a source with tokenizer and preprocessor, and its conversion."""

    def saved(kind: str) -> tuple[Path, Path]:
        model = build(kind).eval()
        reinitialise(model, 0)
        source, out = tmp_path / "source", tmp_path / "out"
        model.save_pretrained(source)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(byte_folder / name, source / name)
        if kind in PREPROCESSORS:
            text = json.dumps(PREPROCESSORS[kind])
            (source / "preprocessor_config.json").write_text(text)
        convert(str(source), out)
        return source, out

    return saved


STAGES = {
    "llava": ["pixels", "vision", "connector", "logits"],
    "llava_next": ["pixels", "vision", "connector", "logits"],
    "clip": ["pixels", "vision", "image vectors", "text vectors", "logits"],
}


@pytest.mark.parametrize("kind", STAGES)
def test_a_converted_model_equals_its_source(kind: str, saved: Any) -> None:
    source, out = saved(kind)
    parity = verify(out, str(source))
    assert [stage.name for stage in parity.stages] == STAGES[kind]
    assert parity.passed
    assert parity.equal_tokens == (None if kind == "clip" else 32)
    assert set(parity.versions) == {"torch", "transformers", "mlx"}
    assert json.loads(json.dumps(parity.to_dict()))["passed"] is True


def write_manifest(folder: Path) -> None:
    """The manifest of files that were changed."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        path = folder / name
        entry |= {"bytes": path.stat().st_size, "sha256": sha256(path)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def change(folder: Path, name: str) -> None:
    """Another weight of this name."""
    path = str(folder / "model.safetensors")
    weights = dict(mx.load(path))
    weights[name] = weights[name] + 0.5
    mx.save_safetensors(path, weights, metadata={"format": "mlx"})
    write_manifest(folder)


def test_the_command_says_in_the_manifest_whether_the_model_passed(
    saved: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    source, out = saved("llama")
    arguments = ["mm1", "verify", str(out), "--against", str(source), "--json"]
    monkeypatch.setattr(sys, "argv", arguments)
    for passed in (True, False):
        with pytest.raises(SystemExit) as ended:
            main()
        assert (ended.value.code or 0) == (0 if passed else 1)
        report = json.loads(capfd.readouterr().out)
        assert report == json.loads((out / "parity.json").read_text())
        assert [stage["name"] for stage in report["stages"]] == ["logits"]
        assert report["passed"] is passed
        manifest = json.loads((out / "manifest.json").read_text())
        assert manifest["source"]["parity_checked"] is passed
        assert manifest["source"]["parts"]["decoder"]["format"] == "llama_hf"
        assert verify_digests(out) == len(manifest["files"])
        assert not list(out.glob(".*"))
        change(out, "decoder.layers.0.mlp.up_proj.weight")


@pytest.mark.parametrize(
    ("name", "failed"),
    [
        ("text.layers.0.mlp.fc1.bias", ["text vectors", "logits"]),
        ("text.projection.weight", ["text vectors", "logits"]),
        ("text.logit_scale", ["logits"]),
        ("vision.projection.weight", ["image vectors", "logits"]),
    ],
)
def test_a_changed_weight_of_clip_s_space_shows(
    name: str, failed: list[str], saved: Any
) -> None:
    source, out = saved("clip")
    change(out, name)
    stages = verify(out, str(source)).stages
    assert [stage.name for stage in stages if not stage.passed] == failed


def test_a_changed_weight_shows_in_the_stages_behind_it(saved: Any) -> None:
    source, out = saved("llava")
    change(out, "connector.linear_1.bias")
    parity = verify(out, str(source))
    passed = {stage.name: stage.passed for stage in parity.stages}
    assert passed == {
        "pixels": True,
        "vision": True,
        "connector": False,
        "logits": False,
    }
    assert not parity.passed


def test_pixels_made_in_another_way_are_different(saved: Any) -> None:
    source, out = saved("llava")
    config = json.loads((out / "config.json").read_text())
    config["image"]["resize"] = "squash"
    config["image"]["mean"] = [0.5, 0.5, 0.5]
    (out / "config.json").write_text(json.dumps(config))
    write_manifest(out)
    parity = verify(out, str(source))
    assert [stage.name for stage in parity.stages if not stage.passed] == ["pixels"]


def test_a_source_that_transformers_does_not_have_is_named(saved: Any) -> None:
    source, out = saved("llama")
    config = json.loads((source / "config.json").read_text())
    config["architectures"] = ["SomebodysModel"]
    (source / "config.json").write_text(json.dumps(config))
    message = "transformers has no model of the kind 'SomebodysModel' to compare with"
    with pytest.raises(CheckpointError, match=message):
        verify(out, str(source))


@pytest.mark.parametrize("place", ["config.json", "preprocessor_config.json"])
def test_a_repository_s_own_code_never_runs(
    place: str, saved: Any, tmp_path: Path
) -> None:
    """Though the user's terminal, asked on stdin, would say yes."""
    source, _ = saved("clip")
    marker = tmp_path / "ran"
    (source / "evil.py").write_text(
        f"open({str(marker)!r}, 'w').write('yes')\n"
        "from transformers import (\n"
        "    CLIPImageProcessor, PretrainedConfig, PreTrainedModel)\n"
        "class C(PretrainedConfig):\n    model_type = 'evil'\n"
        "class M(PreTrainedModel):\n    config_class = C\n"
        "class P(CLIPImageProcessor):\n    pass\n"
    )
    evil: dict[str, Any] = {
        "config.json": {
            "model_type": "evil",
            "architectures": ["AutoModelForCausalLM"],
            "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
        },
        "preprocessor_config.json": {
            "image_processor_type": "P",
            "auto_map": {"AutoImageProcessor": "evil.P"},
        },
    }
    (source / place).write_text(json.dumps(evil[place]))
    request = {
        "source": np.array(str(source)),
        "picture": np.array(str(PICTURE)),
        "tiles": np.zeros((1, SIDE, SIDE, 3), np.float32),
    }
    (tmp_path / "answers").write_text("y\n" * 99)
    terminal = os.dup(0)
    try:
        with (tmp_path / "answers").open() as answers:
            os.dup2(answers.fileno(), 0)
            with pytest.raises(CheckpointError, match=REFUSED[place]):
                ask_source(request)
    finally:
        os.dup2(terminal, 0)
        os.close(terminal)
    assert not marker.exists()


REFUSED = {
    "config.json": "transformers has no model of the kind 'AutoModelForCausalLM'",
    "preprocessor_config.json": "transformers cannot run .* contains custom code",
}


def test_where_memory_has_no_room_it_is_said_what_verifying_is(monkeypatch):
    monkeypatch.setattr("mm1_mlx.budget.allowed", lambda: 1000)
    with pytest.raises(CheckpointError, match="here; verify it where there is more"):
        verify(TINY, "somebody/llava")
