"""Tokens to the text of an answer, which may end before a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_lm.generate import TextStateMachine

from mm1_mlx.answer import FinishReason, Piece
from mm1_mlx.tokenizer import Tokenizer


class Transcript:
    """The text of one answer, token by token.

    Args:
        tokenizer: writes the tokens, and knows those that end an answer.
        stop: strings before which the answer ends.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._detokenizer: Any = tokenizer.hf.detokenizer
        # Holds back text that may turn out to begin a stop string.
        self._machine = TextStateMachine({"normal": [(word, None) for word in stop]})
        self._state = self._machine.make_state()
        # Not its last_segment: where the bytes of a second character are still
        # incomplete, the text becomes shorter for a while, and the first one would come
        # twice.
        self._done = 0

    def add(self, token: int) -> Piece:
        """What the token adds; a piece with a ``finish_reason`` is the last."""
        if token in self._tokenizer.hf.eos_token_ids:
            return self.finish("stop")
        # Decoders are padded: their last tokens may have no text.
        if token < self._tokenizer.size:
            self._detokenizer.add_token(token)
        text, stopped = self._step()
        return Piece(text, token, "stop" if stopped else None)

    def finish(self, reason: FinishReason) -> Piece:
        """What is held back, as the last piece of an answer that ends here."""
        if reason == "cancelled":
            return Piece(self._machine.flush(self._state)[1], None, reason)
        self._detokenizer.finalize()
        text, stopped = self._step()
        if stopped:
            return Piece(text, None, "stop")
        return Piece(text + self._machine.flush(self._state)[1], None, reason)

    def _step(self) -> tuple[str, bool]:
        """The text that came since, and whether a stop string was met behind it."""
        text = self._detokenizer.text[self._done :]
        self._done += len(text)
        self._state, text, name = self._machine.step(self._state, text)
        return text, name is None
