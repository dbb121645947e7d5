"""What a folder of exported functions says of itself: ``mlxfn.json``. No mlx.

It holds all that a program needs beside the functions and ``tokenizer.json``: shapes, how
a picture becomes pixels, and how a question becomes tokens. It is read, and what it says
checked, before mlx sees a file: mlx reads another version's functions as garbage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mm1_mlx.config import ImageConfig
from mm1_mlx.section import Section, require

SIDECAR = "mlxfn.json"
FORMAT = "mm1-mlxfn"
FORMAT_VERSION = 1
TOKENIZER = "tokenizer.json"
ENCODE_FILE, DECODER_FILE = "encode.mlxfn", "decoder.mlxfn"

DType = Literal["float32", "float16", "bfloat16", "int32"]


@dataclass(frozen=True, kw_only=True)
class File(Section):
    """A file beside the sidecar."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Array(Section):
    """An input or output of a function."""

    shape: tuple[int, ...]
    dtype: DType


@dataclass(frozen=True, kw_only=True)
class Function(Section):
    """One function that a file holds, told from its others by its inputs.

    encode: pixels [1, S, S, 3] to image tokens [K, D].
    embed: tokens [1, T] to embeddings [1, T, D].
    run: embeddings [1, T, D], how many positions the cache holds, which row is the last
    one wanted, then keys and values [1, Hkv, capacity, Dh] of every layer; to the logits
    [1, V] of that row, then keys and values with T positions more.
    """

    name: Literal["encode", "embed", "run"]
    file: str
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]


@dataclass(frozen=True, kw_only=True)
class Piece(Section):
    """A part of a prompt: a text, tokens, or the place of the picture or the question."""

    kind: Literal["text", "tokens", "picture", "question"]
    text: str = ""
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Layout(Section):
    """A prompt of one question: tokens, pieces in order, tokens.

    Texts and the question that follow each other are one text, which tokens and the
    picture part.
    """

    begin: tuple[int, ...]
    pieces: tuple[Piece, ...]
    end: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Spelled(Section):
    """A character of special tokens' texts, as ordinary tokens."""

    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class PromptSheet(Section):
    """How a question becomes tokens, and tokens an answer.

    Attributes:
        with_picture: the prompt of a question about a picture, None where the model
            sees none.
        without_picture: of one without.
        strip: whether white space around the question is left out.
        apart: whether every text is tokenised by itself, as if it began the prompt, and
            so is what lies between two ``marks``, and every one of them.
        marks: texts, where it is.
        specials: texts that stay text in a question, longest first, and so does the
            beginning of one at its end: they are written in ``spelled`` characters.
        spelled: those characters.
        filler: the token at a picture's positions.
        image_tokens: how many positions a picture has.
        eos: tokens that end an answer.
        known: tokens from this one on have no text.
    """

    with_picture: Layout | None
    without_picture: Layout
    strip: bool
    apart: bool
    marks: tuple[str, ...]
    specials: tuple[str, ...]
    spelled: tuple[Spelled, ...]
    filler: int
    image_tokens: int
    eos: tuple[int, ...]
    known: int


@dataclass(frozen=True, kw_only=True)
class TokenizerSheet(Section):
    """What of ``tokenizer.json``, beside its vocabulary, merges and added tokens, holds.

    Attributes:
        kind: how a piece of text is written for the merges: each byte as a character, or
            characters as they are and a space as "▁".
        patterns: regular expressions that cut text into words, one after the other.
        space_first: whether a space goes before a text without one (``byte_level``).
        prepend: before which texts "▁" goes (``sentencepiece``): the first, every one
            between added tokens, or none; "every" before another "▁", too.
        nfc: whether text is normalised so first.
        ignore_merges: whether a word of the vocabulary is not taken apart.
        byte_fallback: whether unknown characters are written as bytes.
        unknown: the token of what is unknown still, None to leave it out.
        fuse_unknown: whether several such in a row are one.
        trim: whether the space that begins an answer is left out.
    """

    kind: Literal["byte_level", "sentencepiece"]
    patterns: tuple[str, ...] = ()
    space_first: bool = False
    prepend: Literal["never", "first", "always", "every"] = "never"
    nfc: bool = False
    ignore_merges: bool = False
    byte_fallback: bool = False
    unknown: int | None = None
    fuse_unknown: bool = False
    trim: bool = False


@dataclass(frozen=True, kw_only=True)
class Limits(Section):
    """Of a picture: encoded bytes, pixels, and pixels along a side."""

    max_bytes: int
    max_pixels: int
    max_side: int


@dataclass(frozen=True, kw_only=True)
class Sidecar(Section):
    """A folder of exported functions.

    Attributes:
        mlx: the version that wrote the functions and alone reads them.
        device: where they run; it is part of them.
        chip: what that was called.
        capacity: positions that a prompt and its answer may have together.
        buckets: how many positions ``embed`` and ``run`` take at once, rising from 1.
    """

    format: str
    format_version: int
    written_by: str
    mlx: str
    device: Literal["cpu", "gpu"]
    chip: str
    capacity: int
    buckets: tuple[int, ...]
    functions: tuple[Function, ...]
    image: ImageConfig | None
    limits: Limits
    prompt: PromptSheet
    tokenizer: TokenizerSheet
    files: tuple[File, ...]

    def __post_init__(self) -> None:
        require(
            self.buckets[:1] == (1,)
            and list(self.buckets) == sorted(set(self.buckets)),
            f"{SIDECAR}: buckets {list(self.buckets)} do not rise from 1",
        )
        require(
            self.buckets[-1] <= self.capacity,
            f"{SIDECAR}: a bucket of {self.buckets[-1]} is more than the capacity of "
            f"{self.capacity}",
        )
        sees = self.prompt.with_picture is not None
        require(
            sees == (self.image is not None),
            f"{SIDECAR}: image and prompt.with_picture are given together or not at all",
        )
        names = [function.name for function in self.functions]
        rows = len(self.buckets)
        require(
            names == ["encode"] * sees + ["embed"] * rows + ["run"] * rows,
            f"{SIDECAR}: functions are {names}, expected encode where the model sees, "
            f"then embed and run for {rows} buckets each",
        )
        for function in self.functions:
            self._check(function)

    def find(self, name: str, positions: int = 1) -> Function:
        """The function of a name, for so many positions."""
        found = [function for function in self.functions if function.name == name]
        return found[self.buckets.index(positions)] if len(found) > 1 else found[0]

    def _check(self, function: Function) -> None:
        """Pass only if the function's shapes are what the rest of the sidecar says."""
        expected = self._expected(function)
        require(
            (function.inputs, function.outputs) == expected,
            f"{SIDECAR}: shapes or types of {function.name} in {function.file} are not "
            "those of the other functions, the capacity and the buckets; export the model "
            "again",
        )

    def _expected(
        self, function: Function
    ) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """The function's inputs and outputs, by what else is said."""
        same = [x for x in self.functions if x.name == function.name]
        T = self.buckets[same.index(function)]
        embedded = self.find("embed").outputs
        require(
            len(embedded) == 1 and len(embedded[0].shape) == 3,
            f"{SIDECAR}: embed has no output [1, T, D]",
        )
        D, dtype = embedded[0].shape[-1], embedded[0].dtype
        index = Array(shape=(), dtype="int32")
        row = Array(shape=(1, T, D), dtype=dtype)
        if function.name == "encode":
            side = self.image.size if self.image else 0
            tokens = (self.prompt.image_tokens, D)
            pixels = Array(shape=(1, side, side, 3), dtype="float32")
            return (pixels,), (Array(shape=tokens, dtype=dtype),)
        if function.name == "embed":
            return (Array(shape=(1, T), dtype="int32"),), (row,)
        # Layers may differ in heads, and no other function says how many there are.
        caches, logits = function.inputs[3:], function.outputs[:1]
        fits = caches == self.find("run").inputs[3:] and all(
            len(x.shape) == 4 and x.shape[0] == 1 and x.shape[2] == self.capacity
            for x in caches
        )
        scores = self.find("run").outputs[:1]
        fits = fits and logits == scores and len(caches) % 2 == 0 and len(caches) > 0
        fits = fits and len(logits[0].shape) == 2 and logits[0].shape[0] == 1
        if not fits:
            return (), ()
        return (row, index, index, *caches), (*logits, *caches)
