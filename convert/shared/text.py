"""The ``prompt`` section of a config, and the tokenizer files that go with it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mm1_mlx.config import PromptConfig, Template
from mm1_mlx.errors import CheckpointError

from ..source import Source
from .token_ids import eos_tokens, filler

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
        image_token_id=filler(source, decoder, IMAGE_TOKEN),
        content="parts" if parts else "string",
        eos_token_ids=eos_tokens(source, decoder),
    )


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
