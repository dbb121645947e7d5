"""Ferret-UI (arXiv 2404.05719) on Gemma 2B or Llama 3 8B: ``jadechoghari/Ferret-UI-Gemma2b``.

https://github.com/apple/ml-ferret/blob/3c9e5c9/ferretui/ferretui/model/ferret_arch.py
"""

from mm1_mlx.config import MM1Config, Template

from ..rules import Table
from ..shared import ferret as layout
from ..shared import language
from ..source import Source

KINDS: dict[str, tuple[str, Template]] = {
    "ferret_llama": ("llama", "ferret_llama3"),
    "ferret_gemma": ("gemma", "ferret_gemma"),
}
# The published Llama's misspelling of its number of heads, which is the default.
MISSPELLED = "num_attention_head"

elsewhere = layout.elsewhere


def detect(source: Source) -> bool:
    """Whether the source is a Ferret-UI."""
    return source.config.get("model_type") in tuple(KINDS)


def rules(source: Source) -> Table:
    """The tensor names of the whole model."""
    return layout.rules(KINDS[source.config["model_type"]][0])


def config(source: Source) -> MM1Config:
    """The whole model.

    Raises:
        ConfigError: a field is missing, unknown or not supported.
    """
    kind, template = KINDS[source.config["model_type"]]
    fields, rest = layout.split_config(source, kind)
    rest.pop(MISSPELLED, None)
    text = language.values(rest, "FerretConfig")
    return layout.model(source, fields, text, template)
