"""Tokens to the bytes that each writes, which may be a part of a character."""

from __future__ import annotations

from typing import Any

from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, SPMStreamingDetokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mm1_mlx.tokenizer import Tokenizer

_SPACE = "\u2581".encode()


class Spelling:
    """The bytes of a tokenizer's tokens, as its detokenizer writes them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._size = tokenizer.size
        self._hf = tokenizer.hf
        detokenizer: Any = tokenizer.hf.detokenizer
        bpe = isinstance(detokenizer, BPEStreamingDetokenizer)
        self._trims: bool = getattr(detokenizer, "trim_space", bpe)
        # The byte 0 is written as the character that stands for it.
        self._bytes = {c: bytes([b]) for b, c in bytes_to_unicode().items() if b}
        self._texts: list[Any] | None = None
        self._of_bytes = isinstance(detokenizer, SPMStreamingDetokenizer)
        if bpe or self._of_bytes:
            self._texts = detokenizer.tokenmap

    def trims(self, *, first: bool) -> bool:
        """Whether a token's first space is left out, where no text stands before it.

        Args:
            first: whether no token does either.
        """
        return self._trims and (first or self._of_bytes)

    def __call__(self, token: int) -> bytes:
        """The bytes of a token; of one that only pads the vocabulary none."""
        if token >= self._size:
            return b""
        if self._texts is None:
            return str(self._hf.decode([token])).encode()
        text = self._texts[token]
        if self._of_bytes:
            return text.replace(_SPACE, b" ")
        return b"".join(self._bytes.get(c, c.encode()) for c in text)
