"""Ids of a source's special tokens, from its configs and its tokenizer's."""

import re
from collections.abc import Mapping
from typing import Any

from mm1_mlx.errors import CheckpointError

from ..source import Source

_ID = re.compile("[0-9]{1,9}")


def added_tokens(source: Source, content: str | None, vocabulary: int) -> list[int]:
    """The ids of the tokens of this content that were added to a tokenizer.

    Raises:
        CheckpointError: tokenizer_config.json lists something else than tokens by id.
    """
    given = (source.json("tokenizer_config.json") or {}).get("added_tokens_decoder")
    table = {} if given is None else given
    if not isinstance(table, dict) or not all(
        _ID.fullmatch(number) and isinstance(token, dict)
        for number, token in table.items()
    ):
        raise CheckpointError(
            f"{source.name}: added_tokens_decoder {given!r:.80} in tokenizer_config.json "
            "is not a map of token ids to tokens; get it again"
        )
    found = [
        int(n) for n, x in table.items() if content and x.get("content") == content
    ]
    if found and max(found) >= vocabulary:
        raise CheckpointError(
            f"{source.name}: tokenizer_config.json gives {content!r} the id {max(found)}, "
            f"but there are {vocabulary} tokens; they do not belong together"
        )
    return found


def filler(source: Source, decoder: Mapping[str, Any], image_token: str) -> int:
    """A token of the vocabulary to stand where pictures go: the source's if it has one."""
    config = source.config
    keys = ("pad_token_id", "unk_token_id", "eos_token_id")
    candidates = [
        config.get("image_token_index"),
        config.get("image_token_id"),
        (source.json("added_tokens.json") or {}).get(image_token),
        *(section.get(key) for key in keys for section in (config, decoder)),
    ]
    size = decoder["vocab_size"]
    fitting = (x for x in candidates if isinstance(x, int) and 0 <= x < size)
    return next(fitting, 0)


def eos_tokens(source: Source, decoder: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens that end an answer.

    Raises:
        CheckpointError: the source lists something else than token ids.
    """
    generation = source.json("generation_config.json") or {}
    for section in (generation, source.config, decoder):
        eos = section.get("eos_token_id")
        if eos is not None:
            ids = tuple(eos) if isinstance(eos, list) else (eos,)
            if not all(isinstance(token, int) for token in ids):
                raise CheckpointError(
                    f"{source.name}: eos_token_id {eos!r} is not a list of token ids"
                )
            return ids
    return ()
