"""The ``prompt`` section of a config, and the tokenizer files that go with it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mm1_mlx.config import PromptConfig, Template
from mm1_mlx.errors import CheckpointError

from ..source import Source

IMAGE_TOKEN = "<image>"
FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_ID = re.compile("[0-9]{1,9}")
# A template that loops over a message's content takes it as typed parts.
_LOOPS_OVER_PARTS = re.compile(
    r"for\s+\w+\s+in\s+(\w+(\.content|\[['\"]content['\"]\])|content\b)"
)


def tokenizer_files(source: Source) -> dict[str, Path]:
    """The source's tokenizer files by name."""
    return {name: path for name in FILES if (path := source.file(name))}


def prompt_section(
    source: Source, decoder: Mapping[str, Any], built_in: Template
) -> PromptConfig:
    """How the source turns messages into tokens.

    Args:
        source: where the tokenizer is.
        decoder: the decoder's fields in the source's config.json.
        built_in: the template to use where the source brings none.
    """
    template = _template(source)
    parts = template is not None and _LOOPS_OVER_PARTS.search(template) is not None
    return PromptConfig(
        template="checkpoint" if template else built_in,
        image_token=IMAGE_TOKEN,
        image_token_id=_filler(source, decoder),
        content="parts" if parts else "string",
        eos_token_ids=_eos(source, decoder),
    )


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


def _template(source: Source) -> str | None:
    """The source's chat template, the default one of several."""
    if path := source.file("chat_template.jinja"):
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise CheckpointError(
                f"{path} is not UTF-8 text, as chat templates are; get it again"
            ) from None
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = (source.json(name) or {}).get("chat_template")
        if isinstance(template, list):
            template = next(
                (
                    t.get("template")
                    for t in template
                    if isinstance(t, dict) and t.get("name") == "default"
                ),
                None,
            )
        if template:
            return str(template)
    return None


def _filler(source: Source, decoder: Mapping[str, Any]) -> int:
    """A token of the vocabulary to stand where pictures go: the source's if it has one."""
    config = source.config
    keys = ("pad_token_id", "unk_token_id", "eos_token_id")
    candidates = [
        config.get("image_token_index"),
        config.get("image_token_id"),
        (source.json("added_tokens.json") or {}).get(IMAGE_TOKEN),
        *(section.get(key) for key in keys for section in (config, decoder)),
    ]
    size = decoder["vocab_size"]
    fitting = (x for x in candidates if isinstance(x, int) and 0 <= x < size)
    return next(fitting, 0)


def _eos(source: Source, decoder: Mapping[str, Any]) -> tuple[int, ...]:
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
