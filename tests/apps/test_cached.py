"""A foreign hub repository given as --model is converted once, after a word of consent."""

import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mm1_mlx import hub
from mm1_mlx.apps.cached import resolve
from mm1_mlx.checkpoint import load_config, load_model
from mm1_mlx.errors import CheckpointError
from mm1_mlx.hub import SourceInfo
from mm1_mlx.runtime import TINY

NAME = "somebody/tiny-llama"


@pytest.fixture
def repository(monkeypatch, tmp_path):
    """A hub with one repository, the embedded decoder in Llama's layout; downloads."""
    folder = tmp_path / "hub"
    folder.mkdir()
    llama = {
        name.replace("decoder", "model", 1): np.array(tensor)
        for name, tensor in load_model(TINY).tensors().items()
        if name.startswith("decoder.")
    }
    save_file(llama, folder / "model.safetensors")
    decoder = load_config(TINY).decoder
    fields = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_theta",
        "max_position_embeddings", "tie_word_embeddings", "head_dim", "hidden_act",
    )  # fmt: skip
    config = {name: getattr(decoder, name) for name in fields}
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    downloads = []

    def download(name, *, pickles, folders):
        assert isinstance(pickles, bool)
        assert folders == ()
        downloads.append(name)
        return folder, "mit"

    monkeypatch.setenv("MM1_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "model_type", lambda _: "llama")
    monkeypatch.setattr(
        hub, "describe", lambda name, *_: SourceInfo(name, 7_000_000, "mit")
    )
    monkeypatch.setattr(hub, "download_small", lambda *_: folder)
    monkeypatch.setattr(hub, "download", download)
    return downloads


def test_model_is_converted_once(repository, capfd):
    first = resolve(NAME, yes=True)
    second = resolve(NAME, yes=False)
    assert first == second
    assert repository == [NAME]
    assert load_config(Path(first)).decoder == load_config(TINY).decoder
    assert f"{NAME}: 7.0 MB, licence mit" in capfd.readouterr().err


def test_nothing_is_fetched_without_consent(repository, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(
        CheckpointError, match=f"pass --yes to download and convert {NAME}"
    ):
        resolve(NAME, yes=False)
    assert repository == []
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("reply", "goes_on"), [("y\n", True), ("\n", False), ("", False)]
)
def test_a_terminal_is_asked(repository, monkeypatch, reply, goes_on):
    terminal = io.StringIO(reply)
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)
    if goes_on:
        assert resolve(NAME, yes=False)
    else:
        with pytest.raises(CheckpointError, match="was not downloaded"):
            resolve(NAME, yes=False)
    assert repository == [NAME] * goes_on


def test_models_of_our_own_are_left_alone(repository, monkeypatch, tmp_path):
    assert resolve(None, yes=False) is None
    assert resolve(str(tmp_path), yes=False) == str(tmp_path)
    assert resolve("no such/model/here", yes=False) == "no such/model/here"
    monkeypatch.setattr(hub, "model_type", lambda _: "mm1")
    assert resolve(NAME, yes=False) == NAME
    assert repository == []
