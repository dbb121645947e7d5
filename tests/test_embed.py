"""Pictures and texts meet in one space, as transformers' CLIPModel has it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import (
    pre_tokenizers,
)

from mm1_mlx.config import MM1Config
from mm1_mlx.embed import (
    Embedder,
    classify,
    embed_images,
    embed_texts,
    load_embedder,
)
from mm1_mlx.errors import CheckpointError, ConfigError, PromptError
from mm1_mlx.models import MM1
from mm1_mlx.runtime import TINY

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.reference

SIZE, LONGEST = 28, 32
CLASSES = ["cat", "dog", "red star"]


def write_tokenizer(folder):
    """CLIP's own tokenizer with a few merges: bytes, bytes that end a word, the merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("p", "h")]
    pieces = [*letters, *(f"{x}</w>" for x in letters), *("".join(m) for m in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=merges,
        model_max_length=LONGEST,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="module", params=["highest id", "end token"])
def clip(request, tmp_path_factory):
    """transformers' model, its processor and tokenizer, and ours converted from them."""
    from mm1_mlx.convert import convert

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = write_tokenizer(folder)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.CLIPConfig(
        projection_dim=24,
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "image_size": SIZE,
            "patch_size": 7, **sizes,
        },
        text_config={
            "hidden_size": 32, "intermediate_size": 48, "vocab_size": len(tokenizer),
            "max_position_embeddings": LONGEST, "pad_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": 2 if request.param == "highest id" else len(tokenizer) - 1,
            **sizes,
        },
    )  # fmt: skip
    assert tokenizer.eos_token_id == len(tokenizer) - 1
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim():
                parameter.normal_(std=0.3)
        # Gentle enough that no class is certain.
        model.logit_scale.fill_(4.0)
    model.save_pretrained(folder)
    module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    processor = module.CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    )
    processor.save_pretrained(folder)
    ours = tmp_path_factory.mktemp("ours") / "clip"
    convert(str(folder), ours)
    return model, processor, tokenizer, ours


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    made = []
    for colour, size in (("red", (61, 40)), ("blue", (45, 90)), ("white", (28, 28))):
        plain = Image.new("RGB", size, colour)
        noise = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
        made.append(Image.blend(plain, Image.fromarray(noise), 0.3))
    return made


def reference(clip, pictures, texts):
    model, processor, tokenizer, _ = clip
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    pixels = torch.tensor(np.stack(processor(pictures)["pixel_values"]))
    with torch.no_grad():
        return model(tokens["input_ids"], pixels, tokens["attention_mask"])


def test_zero_shot_equals_transformers(clip, pictures, tolerances):
    embedder = load_embedder(clip[3])
    template = "a photo of a {}."
    expected = reference(clip, pictures, [template.format(x) for x in CLASSES])
    result = classify(embedder, pictures, CLASSES)
    probabilities = expected.logits_per_image.softmax(-1).numpy()
    assert np.abs(result - probabilities).max() <= tolerances["model"]
    np.testing.assert_allclose(result.sum(axis=1), 1, rtol=1e-5)
    images, texts = (
        embed_images(embedder, pictures),
        embed_texts(embedder, [template.format(x) for x in CLASSES]),
    )
    scale = np.exp(embedder.model.text.logit_scale.item())
    logits = expected.logits_per_image.numpy()
    assert (
        np.abs(scale * images @ texts.T - logits).max()
        <= tolerances["model"] * np.abs(logits).max()
    )
    # Pictures are told apart, and classes.
    assert np.ptp(result, axis=0).max() > 0.02
    assert np.ptp(result, axis=1).max() > 0.02


def test_vectors_equal_transformers_and_have_length_1(
    clip, pictures, assert_close, caplog
):
    embedder = load_embedder(clip[3])
    texts = ["Two RED stars", "", "a photo of a cat. " * 9, "é\n~"]
    expected = reference(clip, pictures, texts)
    caplog.clear()
    images, written = embed_images(embedder, pictures), embed_texts(embedder, texts)
    assert images.dtype == written.dtype == np.float32
    assert_close(images, expected.image_embeds.numpy())
    assert_close(written, expected.text_embeds.numpy())
    np.testing.assert_allclose(np.linalg.norm(written, axis=-1), 1, rtol=1e-6)
    assert not caplog.records


def test_batches_do_not_change_a_vector(clip, pictures, assert_close):
    embedder = load_embedder(clip[3])
    many = pictures * 7
    assert_close(embed_images(embedder, many)[18:], embed_images(embedder, pictures))
    texts = [f"a {n}" for n in range(20)]
    alone = np.concatenate([embed_texts(embedder, [text]) for text in texts])
    assert_close(embed_texts(embedder, texts), alone)
    assert (
        embed_images(embedder, []).shape == embed_texts(embedder, []).shape == (0, 24)
    )


def test_a_typed_end_is_no_end(clip):
    embedder = load_embedder(clip[3])
    plain, typed = embed_texts(embedder, ["a cat", "a<|endoftext|> cat"])
    (cut,) = embed_texts(embedder, ["a"])
    assert np.abs(typed - plain).max() > 0.01
    assert np.abs(typed - cut).max() > 0.01
    # Neither is a picture's place, which the tower has no token for.
    assert embed_texts(embedder, ["<image>"]).shape == (1, 24)


def test_it_works_on_another_thread(clip, pictures, assert_close):
    from concurrent.futures import ThreadPoolExecutor

    embedder = load_embedder(clip[3])
    expected = embed_images(embedder, pictures)
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(embed_images, embedder, pictures).result()
    assert_close(result, expected)


def test_a_template_without_a_place_is_refused(clip, pictures):
    embedder = load_embedder(clip[3])
    with pytest.raises(
        PromptError, match=r"template 'a cat' has no \{\} for the class"
    ):
        classify(embedder, pictures, CLASSES, "a cat")
    with pytest.raises(PromptError, match="there are no classes to choose from"):
        classify(embedder, pictures, [])


def test_a_model_without_a_shared_space_is_refused():
    with pytest.raises(
        ConfigError, match="no space that pictures and texts share; conv"
    ):
        load_embedder(TINY)


def test_an_encoder_without_texts_embeds_pictures_alone(clip, pictures, tmp_path):
    sections = json.loads((clip[3] / "config.json").read_text()) | {"text": None}
    embedder = Embedder(MM1(MM1Config.from_dict(sections)), tmp_path)
    assert embed_images(embedder, pictures).shape == (3, 24)
    with pytest.raises(ConfigError, match="has no text tower; convert a whole CLIP"):
        embed_texts(embedder, ["a cat"])
    with pytest.raises(ConfigError, match="has no text tower"):
        classify(embedder, pictures, CLASSES)


def test_a_tokenizer_that_is_missing_or_another_s_is_named(clip, byte_folder, tmp_path):
    embedder = load_embedder(clip[3])
    with pytest.raises(CheckpointError, match="has no tokenizer, so it cannot"):
        embed_texts(Embedder(embedder.model, tmp_path), ["a cat"])
    other = Embedder(embedder.model, Path(byte_folder))
    if embedder.text.eos_token_id is None:
        return  # without a token to look for, any ids that fit are taken
    with pytest.raises(CheckpointError, match="tokens are not the text tower's"):
        embed_texts(other, ["a cat"])
