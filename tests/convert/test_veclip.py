"""VeCLIP with T5's tokenizer beside it embeds texts as transformers' CLIPModel does."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch")
from parity import TOLERANCE, difference, reinitialise  # noqa: E402
from transformers import CLIPConfig, CLIPModel, T5Tokenizer  # noqa: E402

from mm1_mlx.apps.cli import main  # noqa: E402
from mm1_mlx.config import ImageConfig  # noqa: E402
from mm1_mlx.convert import convert  # noqa: E402
from mm1_mlx.embed import embed_texts, load_embedder  # noqa: E402
from mm1_mlx.errors import CheckpointError  # noqa: E402
from mm1_mlx.presets import CLIP_MEAN, CLIP_STD  # noqa: E402

pytestmark = pytest.mark.reference

LONGEST = 12
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_act": "gelu",
}
TEXTS = [
    "a red star",
    "a photo of a dog on the grass",
    "zebra",  # spelled: no word of the vocabulary
    "",
    "the dog on the red grass and the star on the dog of the photo",  # cut
    "a dog \u00fc",  # with what no piece holds
]
WORDS = ["a", "photo", "of", "dog", "on", "the", "grass", "red", "star", "and"]


def t5_tokenizer() -> Any:
    """T5's Unigram: padding 0, end 1, unknown 2, its 32 000 pieces, 100 fillers."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"\u2581{word}", -3.0) for word in WORDS]
    pieces += [(c, -9.0) for c in "\u2581abcdefghijklmnopqrstuvwxyz"]
    taken = {piece for piece, _ in pieces}
    pieces += [(f"\u2581{i:05}", -20.0) for i in range(32_000 - len(taken))]
    pieces += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]
    tokenizer = T5Tokenizer(vocab=pieces, model_max_length=LONGEST)
    assert len(tokenizer) == 32_100
    assert tokenizer.bos_token_id is None
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    return tokenizer


def veclip(folder: Path) -> Any:
    """transformers' model, saved as Apple's archives hold it: no files beside it."""
    text = {"vocab_size": 32_128, "max_position_embeddings": LONGEST}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    config = CLIPConfig(
        projection_dim=24,
        vision_config={**SIZES, "image_size": 28, "patch_size": 14},
        text_config={**SIZES, **text, **tokens},
    )
    model = CLIPModel(config).eval()
    reinitialise(model, 0)
    model.save_pretrained(folder)
    return model


def their_vectors(model: Any, tokenizer: Any) -> NDArray[np.float32]:
    rows = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        output = model(**rows, pixel_values=torch.zeros(1, 3, 28, 28))
    return np.asarray(output.text_embeds)


def test_texts_are_embedded_as_transformers_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    model, tokenizer = veclip(folder), t5_tokenizer()
    tokenizer.save_pretrained(folder)
    assert (folder / "tokenizer.json").is_file()
    report = convert(str(folder), out)
    # Recognised by its vocabulary: TensorFlow's pictures.
    assert report.config.image == ImageConfig(
        size=28, resize="crop", mean=CLIP_MEAN, std=CLIP_STD, resample="bilinear"
    )
    assert report.has_tokenizer
    embedder = load_embedder(out, mx.float32)
    ours = embed_texts(embedder, TEXTS)
    expected = their_vectors(model, tokenizer)
    assert difference(ours, expected) <= TOLERANCE
    # Every text is another.
    cosines = expected @ expected.T - 2 * np.eye(len(TEXTS), dtype=np.float32)
    assert cosines.max() < 0.99
    options = [x for text in TEXTS for x in ("--text", text)]
    monkeypatch.setattr(sys, "argv", ["mm1", "embed", "-m", str(out), *options])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    rows = json.loads(capfd.readouterr().out)["texts"]
    assert [row["text"] for row in rows] == TEXTS
    printed = np.array([row["embedding"] for row in rows], np.float32)
    assert difference(printed, expected) <= TOLERANCE


def test_without_the_tokenizer_the_way_out_is_named(tmp_path: Path) -> None:
    veclip(tmp_path / "in")
    assert not convert(str(tmp_path / "in"), tmp_path / "out").has_tokenizer
    message = "has no tokenizer, so it cannot embed texts; put the files .* beside"
    with pytest.raises(CheckpointError, match=message):
        embed_texts(load_embedder(tmp_path / "out", mx.float32), TEXTS)
