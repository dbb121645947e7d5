"""What a conversion will write is known before it begins, and must fit on the disk."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
import sources
from test_packed import by_mlx_vlm

from mm1_mlx import writer
from mm1_mlx.checkpoint import load_model
from mm1_mlx.config import DecoderConfig, MM1Config, PromptConfig
from mm1_mlx.convert import convert
from mm1_mlx.errors import CheckpointError
from mm1_mlx.presets import PRESETS

SMALL = MM1Config(
    decoder=DecoderConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        max_position_embeddings=99,
        tie_word_embeddings=True,
    ),
    prompt=PromptConfig(template="plain"),
)


def half_llama(folder: Path) -> str:
    """A Llama of two types: norms in float32, all else in bfloat16."""
    tensors = {
        name: x if "norm" in name else x.astype(mx.bfloat16)
        for name, x in sources.llama_tensors().items()
    }
    return str(sources.write(folder, sources.LLAMA, tensors))


def clip_beside(name: Callable[[Path], str]) -> Callable[[Path], dict[str, Any]]:
    """Options: an encoder, a new connector and a decoder."""
    return lambda folder: {
        "vision": str(sources.clip(folder / "clip")),
        "connector": "mlp",
        "decoder": name(folder / "decoder"),
    }


def packed(folder: Path) -> dict[str, Any]:
    return {"source": str(by_mlx_vlm(folder)[0])}


def mxfp4(folder: Path) -> dict[str, Any]:
    packing = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    return {"source": str(by_mlx_vlm(folder, packing=packing)[0])}


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "whole": lambda folder: {"source": str(sources.llava(folder / "llava"))},
    "two types": lambda folder: {"source": half_llama(folder / "llama")},
    "experts": lambda folder: {
        "source": half_llama(folder / "llama"),
        "upcycle": "experts=4,every=2",
    },
    "parts": clip_beside(half_llama),
    "a preset's part": clip_beside(lambda _: "small"),
    "packed": packed,
    "packed without biases": mxfp4,
}


@pytest.mark.parametrize("dtype", [None, mx.float16])
@pytest.mark.parametrize("name", CASES)
def test_the_size_is_known_before(
    name: str, dtype: mx.Dtype | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "small", SMALL)
    sizes: list[int] = []
    initialised: list[int] = []
    monkeypatch.setattr(writer, "check_space", lambda _, size: sizes.append(size))
    options = {"source": None} | CASES[name](tmp_path)
    out = tmp_path / "out"
    report = convert(**options, out=out, dtype=dtype, starting=initialised.append)
    tensors = load_model(out).tensors()
    assert sizes == [sum(x.nbytes for x in tensors.values())]
    new = [x for k, x in tensors.items() if k.split(".")[0] in report.needs_training]
    assert initialised == [sum(x.nbytes for x in new)]


def test_a_full_disk_is_named_before_a_byte_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llava = str(sources.llava(tmp_path / "llava"))
    convert(llava, tmp_path / "out")
    size = sum(x.nbytes for x in load_model(tmp_path / "out").tensors().values())
    room = SimpleNamespace(free=size)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: room)
    convert(llava, tmp_path / "fits/in/it")
    room.free = size - 1
    calls: list[Any] = []
    message = r"needs 0.0 MB, but its disk has 0.0 MB free; name .* --bits 4"
    with pytest.raises(CheckpointError, match=message):
        convert(llava, tmp_path / "too/full", starting=calls.append)
    assert calls == []
    assert not (tmp_path / "too").exists()
    convert(llava, tmp_path / "half", dtype=mx.float16)
