"""The C++ program answers as the runtime does: prompt, pixels, tokens and text."""

import hashlib
import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from mlxfn_demo import ask_demo, run_demo
from PIL import Image
from tokenizers import Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from mm1_mlx.config import ImageConfig
from mm1_mlx.errors import CheckpointError
from mm1_mlx.image import load_picture
from mm1_mlx.mlxfn import export
from mm1_mlx.mlxfn.sidecar import SIDECAR
from mm1_mlx.prompt import Prompt
from mm1_mlx.runtime import TINY, config_of, generate, load
from mm1_mlx.tokenizer import load_tokenizer

STAR, FOUR = TINY / "red-star.png", TINY / "four-shapes.png"
ASKED = [
    ("What colour is the star?", STAR),
    ("Describe the picture.", FOUR),
    ("How many shapes are there?", FOUR),
    ("Is there a purple heart?", FOUR),
    ("What is left of the heart? Answer in one sentence.", FOUR),
    ("What colour is the star?", None),
    ("  Where\n\tis   it?  ", None),
]


def check(runtime, folder, question, picture):
    pictures = [] if picture is None else [picture]
    expected = generate(runtime, question, pictures, max_tokens=64)
    prompt = Prompt.build(question, pictures, runtime.config, runtime.tokenizer)
    found = ask_demo(folder, question, picture)
    assert found["prompt_tokens"] == list(prompt.tokens)
    ended = [t for t in found["tokens"] if t not in runtime.tokenizer.hf.eos_token_ids]
    assert ended == [
        t for t in expected.tokens if t not in runtime.tokenizer.hf.eos_token_ids
    ]
    assert found["text"] == expected.text
    return expected.text


def test_float32_answers_are_those_of_generate(exported, tiny):
    answers = {check(tiny, exported, *asked) for asked in ASKED}
    assert len(answers) > 4


def test_4_bit_answers_are_those_of_generate(packed, packed_exported):
    with load(packed) as runtime:
        answers = {check(runtime, packed_exported, *asked) for asked in ASKED}
    assert len(answers) > 4


def test_an_answer_is_streamed_as_text(exported):
    question = "What colour is the star?"
    assert run_demo(exported, STAR, question) == (0, "red\n", "")
    assert run_demo("--max-tokens", 1, exported, STAR, question) == (0, "red\n", "")


TEXTS = [
    "What colour is the square?",
    "  two  spaces,   tabs\tand\n\nlines  ",
    "it's 'quoted', they'll've; 12345 6.78 €9 x2y½²Ⅷ٣٤z",
    "Zoë naïve café e\u0301a\u0308 — “curly” … ﬁ",
    "你好 世界 日本語 한국어 العربية हिन्दी",
    "👩‍👩‍👧‍👦 🇫🇷 🏽 \u200b\u00a0|\ufeff",
    "a literal <image> and </s><pad> stay text",
    "private \ue000 \uf8ff use",
    "x" * 400,
    "▁ the space of SentencePiece ▁▁",
    "<0x41> <tool> a<tool>b",
]
# A question that ends so, or is so.
ENDS = ["an end that begins one </", "and another one <ima  \n", "<", "▁ first"]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(backend, *, nfc=False, ignore=False, space=False):
    """GPT-2's words, or Llama 3's and Qwen's."""
    if nfc or ignore:
        backend.normalizer = normalizers.NFC() if nfc else None
        backend.model.ignore_merges = ignore
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    backend.add_tokens(["<tool>"])


def digits(backend, *, individual=True):
    """DeepSeek's and Falcon's: digits apart from letters, each or a number whole."""
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


def legacy(backend):
    """Llama 2's files: the space before a text is the normalizer's."""
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )


def gemma(backend):
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )


def metaspace(scheme, split):
    def change(backend):
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme, split)

    return change


def unknown(backend):
    """Without bytes: characters that are not known become one <unk> in a row."""
    backend.model.byte_fallback = False


TOKENIZERS = {
    "gpt2": ("byte_folder", byte_level),
    "spaced": ("byte_folder", lambda b: byte_level(b, space=True)),
    "llama3": ("byte_folder", lambda b: byte_level(b, ignore=True)),
    "qwen": ("byte_folder", lambda b: byte_level(b, nfc=True)),
    "digits": ("byte_folder", digits),
    "numbers": ("byte_folder", lambda b: digits(b, individual=False)),
    "first": ("spm_folder", metaspace("first", False)),
    "always": ("spm_folder", metaspace("always", True)),
    "never": ("spm_folder", metaspace("never", False)),
    "legacy": ("spm_folder", legacy),
    "gemma": ("spm_folder", gemma),
    "unknown": ("spm_folder", unknown),
}
TEMPLATES = {"first": "honeybee", "legacy": "ferret", "qwen": "vicuna_v1"}


@pytest.fixture
def with_tokenizer(request, write_model, tmp_path):
    """A function: a small model whose tokenizer was changed."""

    def make(source, change, **prompt):
        folder = tmp_path / "tokenizer"
        folder.mkdir()
        for path in request.getfixturevalue(source).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        backend = Backend.from_file(str(folder / "tokenizer.json"))
        change(backend)
        backend.save(str(folder / "tokenizer.json"))
        return write_model(
            tmp_path / "model",
            folder,
            decoder={"vocab_size": 340, "max_position_embeddings": 2048},
            prompt=prompt,
        )

    return make


# One of a kind is asked with every change, the others in drills.
USUAL = ("gpt2", "qwen", "digits", "first", "legacy")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in USUAL else pytest.mark.drill)
        for name in TOKENIZERS
    ],
)
def test_prompts_are_tokenised_as_the_runtime_does(name, with_tokenizer, tmp_path):
    template = TEMPLATES.get(name, "llava")
    model = with_tokenizer(*TOKENIZERS[name], template=template)
    export(model, tmp_path / "out", prefill=(16,))
    config = config_of(model)
    tokenizer = load_tokenizer(model, config.prompt)
    together = "\n".join([*TEXTS, ""])
    for text, picture in [(together, STAR), *((text, None) for text in ENDS)]:
        pictures = [] if picture is None else [picture]
        expected = Prompt.build(text, pictures, config, tokenizer)
        found = ask_demo(tmp_path / "out", text, picture, max_tokens=1)
        assert found["prompt_tokens"] == list(expected.tokens), text


def test_random_answers_are_written_as_the_runtime_does(with_tokenizer, tmp_path):
    """Bytes that are no characters, and characters in pieces: a model of random weights."""
    model = with_tokenizer("byte_folder", byte_level)
    export(model, tmp_path / "out", prefill=(16,))
    with load(model) as runtime:
        answers = [check(runtime, tmp_path / "out", text, None) for text in TEXTS[:5]]
    assert any("\ufffd" in answer for answer in answers)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda b: setattr(b, "normalizer", normalizers.NFKC()), "NFKC"),
        (lambda b: setattr(b, "normalizer", normalizers.Lowercase()), "Lowercase"),
        (
            lambda b: setattr(b, "pre_tokenizer", pre_tokenizers.Whitespace()),
            "Whitespace",
        ),
        (lambda b: setattr(b.model, "end_of_word_suffix", "</w>"), "end_of_word"),
    ],
)
def test_a_tokenizer_that_cannot_be_described_is_named(
    change, match, with_tokenizer, tmp_path
):
    model = with_tokenizer("byte_folder", change)
    with pytest.raises(CheckpointError, match=match):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Of a picture of any shape: down, up, and along one side alone.
SIZES = [(96, 96), (640, 427), (31, 97), (1, 50), (200, 16), (16, 200), (3, 5)]
IMAGES = [
    {"resize": "squash"},
    {"resize": "pad"},
    {"resize": "crop"},
    {"resize": "crop", "crop_from": 111, "crop_rounding": "even"},
    {"resize": "crop", "resample": "bilinear"},
    {"resize": "squash", "resample": "bilinear"},
]


def noise(size, mode="RGB"):
    random = np.random.default_rng(len(mode) + sum(size))
    width, height = size
    channels = len(mode)
    pixels = random.integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels, mode)


def check_pixels(folder, config, path):
    tile = load_picture(path, config.image).tiles[0]
    found = ask_demo(folder, "What?", path, max_tokens=1)["pixels_sha256"]
    assert found == hashlib.sha256(tile.tobytes()).hexdigest(), path.name


@pytest.mark.parametrize("image", IMAGES, ids=str)
def test_pixels_are_the_runtimes_to_the_bit(image, exported, tiny, tmp_path):
    """As the sidecar has it: the encoder stays the same."""
    folder = shutil.copytree(exported, tmp_path / "functions")
    values = json.loads((folder / SIDECAR).read_text())
    config = ImageConfig.from_dict(values["image"] | image)
    values["image"] = config.to_dict()
    (folder / SIDECAR).write_text(json.dumps(values))
    for size in SIZES:
        path = tmp_path / f"{size[0]}x{size[1]}.png"
        noise(size).save(path)
        check_pixels(folder, replace(tiny.config, image=config), path)


def with_exif(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


@pytest.fixture
def pictures(tmp_path):
    """PNGs and JPEGs of every kind, by their names."""

    def save(name, image, **options):
        image.save(tmp_path / name, **options)

    size = (61, 40)
    for mode in ("L", "RGB", "LA", "RGBA"):
        save(f"{mode}.png", noise(size, mode))
    save("1.png", noise(size, "L").convert("1"))
    save("P.png", noise(size).quantize(16))
    save("P-clear.png", noise(size).quantize(16), transparency=3)
    save("L-clear.png", noise(size, "L"), transparency=7)
    wide = np.random.default_rng(1).integers(0, 1 << 16, (40, 61), np.uint16)
    save("I16.png", Image.fromarray(wide))
    save("L.jpg", noise(size, "L"))
    for subsampling in (0, 1, 2):
        save(f"{subsampling}.jpg", noise(size), quality=80, subsampling=subsampling)
    save("progressive.jpg", noise(size), progressive=True)
    for orientation in range(1, 9):
        save(f"exif{orientation}.jpg", noise(size), **with_exif(orientation))
        save(f"exif{orientation}.png", noise(size), **with_exif(orientation))
    return sorted(tmp_path.glob("*.*g"))


def test_pictures_are_decoded_as_the_runtime_does(pictures, exported, tiny):
    assert len(pictures) == 30
    for path in pictures:
        check_pixels(exported, tiny.config, path)


def refused(*arguments):
    status, out, err = run_demo(*arguments)
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_bad_pictures_are_one_line(exported, tmp_path):
    buffer = io.BytesIO()
    noise((300, 200)).save(buffer, "JPEG")
    data = buffer.getvalue()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    noise((300, 200)).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("not a picture")
    Image.new("1", (9000, 9000)).save(tmp_path / "large.png")
    Image.new("CMYK", (9, 9)).save(tmp_path / "cmyk.jpg")
    for name, match in {
        "cut.jpg": "is damaged or cut short",
        "cut.png": "is damaged or cut short",
        "text.png": "is not a PNG or JPEG",
        "large.png": "has 9000 x 9000 pixels, expected",
        "cmyk.jpg": "is a CMYK picture",
        "none.png": "was not found",
        ".": "is no file",
    }.items():
        assert match in refused(exported, tmp_path / name, "What is it?")


def test_bad_questions_are_one_line(exported):
    assert "more than the 1024 that" in refused(exported, STAR, "a b " * 1000)
    assert "takes a number" in refused("--max-tokens", "0", exported, "What?")
    assert "see --help" in refused(exported)
    assert "does not exist" in refused("no such folder", "What?")
    assert "not valid UTF-8" in refused(exported, "na\udcefve")
