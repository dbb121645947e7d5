"""A JSON schema into the tokens that may come next, so that an answer is JSON of it.

llguidance parses schema and answer; it is small, and asked for by ``schema`` alone.

Source: https://github.com/guidance-ai/llguidance
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mm1_mlx.errors import PromptError, blaming
from mm1_mlx.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

# What a schema may be: bytes as JSON, values in it, how deep they lie in each other.
MAX_BYTES = 64 << 10
MAX_VALUES = 2_000
MAX_DEPTH = 32
# Compiled schemas that are kept.
KEPT = 8
# Of one answer's lexer, 1 to 2 KB each.
MAX_LEXER_STATES = 50_000
# As json.dumps writes: what may stand between values is one thing, so that no answer
# goes on with spaces for ever.
LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammars:
    """The schemas that a model's answers may be held to.

    Args:
        tokenizer: the model's.
        vocab_size: the width of its logits.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._vocabulary: LLTokenizer | None = None
        # Schemas are compiled where prompts are read, and looked up where they are run.
        self._lock = threading.Lock()
        # Those used last, last; none has read a token.
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    @blaming(setting="schema")
    def constraint(self, schema: Mapping[str, Any]) -> Constraint:
        """What holds one answer to a JSON schema.

        Raises:
            PromptError: llguidance is not installed, or the schema is too large, is none,
                or asks for what cannot be held to.
        """
        text = check_schema(schema)
        with self._lock:
            if text in self._compiled:
                self._compiled.move_to_end(text)
            else:
                self._compiled[text] = self._compile(text)
                if len(self._compiled) > KEPT:
                    self._compiled.popitem(last=False)
            matcher = self._compiled[text].deep_copy()
        return Constraint(matcher, self._vocab_size, self._tokenizer.hf.eos_token_ids)

    def _compile(self, text: str) -> LLMatcher:
        lib = _llguidance()
        if self._vocabulary is None:
            self._vocabulary = self._read_vocabulary()
        grammar = lib.LLMatcher.grammar_from_json_schema(text, overrides=LAYOUT)
        limits = lib.LLParserLimits(
            max_lexer_states=MAX_LEXER_STATES, verbose_errors=False
        )
        matcher = lib.LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits)
        # Only its first step shows that nothing at all fits.
        first = matcher.deep_copy()
        first.compute_bitmask()
        if first.is_error():
            raise PromptError(f"the schema cannot be held to: {_reason(first)}")
        return matcher

    def _read_vocabulary(self) -> LLTokenizer:
        from llguidance.hf import from_tokenizer

        hf = self._tokenizer.hf
        try:
            with self._tokenizer.lock:
                return from_tokenizer(
                    hf._tokenizer,
                    # A picture's token may lie behind the decoder's own.
                    n_vocab=max(self._vocab_size, len(hf)),
                    eos_token=sorted(hf.eos_token_ids),
                )
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise PromptError(
                f"the model's tokenizer cannot be held to a schema ({reason:.200}); "
                "ask without one"
            ) from None


class Constraint:
    """One answer's place in its grammar; ``sampling.Sampler`` draws within it.

    Args:
        matcher: has read the answer so far.
        vocab_size: the width of logits.
        ends: the tokens that end an answer.
    """

    def __init__(
        self, matcher: LLMatcher, vocab_size: int, ends: Collection[int]
    ) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._ends = ends
        # Tokens behind the end: the matcher would not count them when it goes back.
        self._behind = 0

    def mask(self, logits: mx.array) -> mx.array:
        """Logits [V] with -inf for what may not come next.

        Where the grammar is at its end, the tokens that end an answer are left.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, count=self._vocab_size, bitorder="little")
        return mx.where(mx.array(allowed.view(bool)), logits, -mx.inf)

    def accept(self, token: int) -> None:
        """Go on behind a token that was drawn."""
        if self._behind or token in self._ends:
            self._behind += 1
        else:
            self._matcher.consume_token(token)

    def rewind(self, count: int) -> None:
        """Take back the tokens accepted last."""
        behind = min(count, self._behind)
        self._behind -= behind
        self._matcher.rollback(count - behind)

    @blaming(setting="schema")
    def check(self) -> None:
        """Nothing, where the answer is within its grammar so far.

        Raises:
            PromptError: the schema was too much to follow any further.
        """
        if self._matcher.is_error():
            raise PromptError(
                f"the schema is too complex to follow ({_reason(self._matcher)}); "
                "give a simpler one"
            )


def check_schema(schema: Mapping[str, Any]) -> str:
    """The schema as JSON, if it is small enough.

    Raises:
        PromptError: it is no JSON object, or too large.
    """
    if not isinstance(schema, Mapping):
        raise PromptError(
            f"the schema is {type(schema).__name__}, expected a JSON object"
        )
    _check_size(schema)
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        size = len(text.encode())
    except (TypeError, ValueError) as error:
        raise PromptError(f"the schema is not JSON: {error}") from None
    if size > MAX_BYTES:
        raise PromptError(
            f"the schema has {size:,} bytes, expected at most {MAX_BYTES:,}"
        )
    return text


def _check_size(schema: Mapping[str, Any]) -> None:
    left: list[tuple[Any, int]] = [(schema, 1)]
    count = 0
    while left:
        value, depth = left.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise PromptError(f"the schema is more than {MAX_DEPTH} levels deep")
        if count > MAX_VALUES:
            raise PromptError(f"the schema holds more than {MAX_VALUES:,} values")
        if isinstance(value, Mapping):
            left += ((inner, depth + 1) for inner in value.values())
        elif isinstance(value, list | tuple):
            left += ((inner, depth + 1) for inner in value)


def _reason(matcher: LLMatcher) -> str:
    """The parser's error, without what it says of its own state."""
    said = matcher.get_error().removesuffix("<non-verbose/>")
    return " ".join(said.split())[:200] or "no answer fits it"


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise PromptError(
            'a schema needs llguidance; pip install "mm1-mlx[schema]"'
        ) from None
    return llguidance
