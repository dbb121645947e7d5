"""How messages become tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mm1_mlx.section import Section, require

Template = Literal[
    "checkpoint",
    "llava",
    "vicuna_v1",
    "honeybee",
    "plain",
    "mistral",
    "stablelm",
    "xgen_mm",
    "auroracap",
    "ferret",
    "ferret_gemma",
    "ferret_llama3",
]


@dataclass(frozen=True, kw_only=True)
class PromptConfig(Section):
    """How messages become tokens."""

    # A built-in template, or the checkpoint's own (chat_template of the tokenizer).
    template: Template
    # What the template writes where a picture stands.
    image_token: str = "<image>"
    # A valid id that fills the picture's positions; image tokens replace its embedding.
    image_token_id: int = 0
    # Tokens that the tokenizer's files lack, in the order of their ids, which follow.
    added_tokens: tuple[str, ...] = ()
    # What a built-in template writes between a picture and the text after it, in place of
    # what its project does.
    after_image: str | None = None
    # What stands where a region's token goes (Ferret), beside its coordinates.
    region_token: str = "<region_fea>"
    # Coordinates count 0 to this, whatever the picture's size.
    coordinate_range: int = 1000
    # Whether the checkpoint's template takes content as typed parts or as one string.
    content: Literal["parts", "string"] = "string"
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require(self.image_token != "", "PromptConfig.image_token is empty")
        require(self.region_token != "", "PromptConfig.region_token is empty")
        require(
            self.coordinate_range >= 1,
            f"PromptConfig.coordinate_range: {self.coordinate_range} is not positive",
        )
