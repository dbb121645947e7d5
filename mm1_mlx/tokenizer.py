"""Text to tokens of a checkpoint, safe against special tokens typed by a user.

mlx-lm's wrapper around the checkpoint's Hugging Face tokenizer does the work; this file
loads it silently and keeps a literal "<image>" in somebody's text from becoming a
picture, or a typed "</s>" from ending a turn.
"""

from __future__ import annotations

import json
import re
import threading
from datetime import date, datetime, time
from functools import cached_property
from pathlib import Path
from typing import Any

from mlx_lm import tokenizer_utils
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken
from transformers import PreTrainedConfig

from mm1_mlx.config import PromptConfig
from mm1_mlx.errors import CheckpointError
from mm1_mlx.files import read_json

# Private-use characters that stand for typed special tokens while a template renders.
_FIRST_STAND_IN = 0xE000
_LAST_STAND_IN = 0xF8FF

# What transformers and mlx-lm raise on tokenizer files that are missing or damaged.
_DAMAGE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ImportError,
    RecursionError,
)


# How chat templates ask transformers for the time, as Llama 3's do for the day.
_NOW = re.compile(r"""strftime_now\(\s*(["'])([^"'\\]*)\1\s*\)""")


class Tokenizer:
    """A checkpoint's tokenizer, with one token for a picture's place.

    Attributes:
        hf: mlx-lm's wrapper; ``hf.detokenizer`` streams text, ``hf.eos_token_ids`` end it.
        image_token: what a template writes where a picture stands.
        image_id: its token; not always one of the decoder's vocabulary.
        region_token: what stands for a region of a picture, None where the model has no
            sampler of regions.
        region_id: its token, likewise.
        specials: texts that a user may type without their meaning, longest first.
        vocabulary: the checkpoint's tokens by their texts.
        size: how many tokens the checkpoint's files know; a decoder may have more.
        today: the day that a chat template is told, None for the day that it is.
        lock: held by whoever turns text into tokens while other threads may, too: texts
            that were typed may add to it.
    """

    def __init__(
        self, hf: TokenizerWrapper, image_token: str, region_token: str | None = None
    ) -> None:
        self.hf = hf
        self.lock = threading.RLock()
        self.image_token = image_token
        self.region_token = region_token
        self.today: date | None = None
        self.size = len(hf)
        self.vocabulary = hf.get_vocab()
        specials = {
            str(token) for token in hf.added_tokens_decoder.values() if token.special
        }
        self._add(image_token)
        self.image_id: int = hf.convert_tokens_to_ids(image_token)
        self.region_id: int | None = None
        specials.add(image_token)
        if region_token is not None:
            self._add(region_token)
            self.region_id = hf.convert_tokens_to_ids(region_token)
            specials.add(region_token)
        # Longest first, so that no special token is cut in two by a shorter one.
        self.specials = sorted(specials, key=len, reverse=True)
        vocabulary = hf.get_vocab()
        self._unused = (
            chr(code)
            for code in range(_FIRST_STAND_IN, _LAST_STAND_IN + 1)
            if chr(code) not in vocabulary
        )
        self._stand_ins: dict[str, str] = {}
        self._private = dict.fromkeys(
            range(_FIRST_STAND_IN, _LAST_STAND_IN + 1), "\ufffd"
        )
        self._typed: dict[int, list[int]] = {}

    @property
    def dated(self) -> bool:
        """Whether the chat template writes the day that it is."""
        template = self.hf.chat_template
        return isinstance(template, str) and bool(_NOW.search(template))

    def template_of_today(self) -> str | None:
        """The chat template that writes ``today``, None for the one that there is.

        transformers lets nobody else tell a template the time.
        """
        if self.today is None or not self.dated:
            return None
        moment = datetime.combine(self.today, time())

        def written(call: re.Match[str]) -> str:
            return json.dumps(moment.strftime(call[2]), ensure_ascii=False)

        return _NOW.sub(written, self.hf.chat_template)

    @cached_property
    def longest(self) -> int:
        """At least as many bytes as the text of any token has."""
        return max(len(text.encode()) for text in self.vocabulary)

    def shield(self, text: str) -> str:
        """``text`` with every special token in it replaced by a stand-in.

        So is the beginning of one at its end, which a template might complete with the
        next text.
        """
        text = text.translate(self._private)
        for special in self.specials:
            if special in text:
                text = text.replace(special, self._stand_in(special))
        body = text.rstrip()
        start = self._begun(body)
        if start < len(body):
            text = body[:start] + self._stand_in(body[start:]) + text[len(body) :]
        return text

    def _begun(self, text: str) -> int:
        """Where the longest beginning of a special token at the text's end starts."""
        longest = len(self.specials[0])
        for start in range(max(0, len(text) - longest + 1), len(text)):
            if any(special.startswith(text[start:]) for special in self.specials):
                return start
        return len(text)

    def _stand_in(self, typed: str) -> str:
        """The character that stands for a typed text, known to the tokenizer."""
        if typed not in self._stand_ins:
            stand_in = self._stand_ins[typed] = next(self._unused, "\ufffd")
            self._add(stand_in)
            self._typed[self.hf.convert_tokens_to_ids(stand_in)] = self.spell(typed)
        return self._stand_ins[typed]

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Tokens of rendered text; stand-ins become the characters they stand for."""
        tokens = self.hf.encode(text, add_special_tokens=add_special_tokens)
        if not self._typed:
            return tokens
        return [t for token in tokens for t in self._typed.get(token, [token])]

    def _add(self, text: str) -> None:
        if text not in self.hf.get_vocab():
            token = AddedToken(text, special=True, normalized=False)
            self.hf.add_tokens([token], special_tokens=True)

    def spell(self, special: str) -> list[int]:
        """A special token's text, or some of it, character by character, as ordinary tokens."""
        vocabulary = self.hf.get_vocab()
        spelled: list[int] = []
        for c in special:
            fallback = [vocabulary.get(f"<0x{byte:02X}>") for byte in c.encode()]
            # Byte-level vocabularies spell other characters than these differently,
            # and SentencePiece would put a space before a character encoded alone.
            if c.isascii() and c in vocabulary:
                spelled.append(vocabulary[c])
            elif None not in fallback:
                spelled += fallback
            else:
                spelled += self.hf.encode(c, add_special_tokens=False)
        return spelled


def load_tokenizer(
    path: Path, config: PromptConfig, *, regions: bool = False
) -> Tokenizer:
    """The tokenizer of a model folder.

    Args:
        path: the folder.
        config: how the model turns messages into tokens.
        regions: whether the model has tokens for regions of pictures.

    Raises:
        CheckpointError: its files are missing or damaged.
    """
    extra: dict[str, Any] = {
        # A config of its own: AutoTokenizer warns about a config.json it does not know.
        "config": PreTrainedConfig(),
        "trust_remote_code": False,
    }
    try:
        hf = tokenizer_utils.load(path, extra, eos_token_ids=list(config.eos_token_ids))
    except Exception as error:
        # tokenizers raises bare Exceptions, which no narrower clause would catch.
        if type(error) is not Exception and not isinstance(error, _DAMAGE):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: the tokenizer cannot be loaded ({reason[:200]}); "
            "get its files again"
        ) from None
    legacy = path / "chat_template.json"
    # A processor's template: it wins over a tokenizer's, as in convert/shared/text.py.
    if legacy.is_file() and not (path / "chat_template.jinja").is_file():
        hf.chat_template = _read_template(legacy)
    hf.add_tokens(
        [AddedToken(x, special=True, normalized=False) for x in config.added_tokens],
        special_tokens=True,
    )
    return Tokenizer(hf, config.image_token, config.region_token if regions else None)


def _read_template(path: Path) -> str:
    content = read_json(path)
    template = content.get("chat_template") if isinstance(content, dict) else None
    if not isinstance(template, str):
        raise CheckpointError(f"{path} holds no template; get it again")
    return template
