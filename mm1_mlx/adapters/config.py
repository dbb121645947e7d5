"""Where low-rank matrices stand in a model, how many and how strong they are."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mm1_mlx.section import Section, check_sizes, require

MAX_RANK = 1024
MAX_SCALE = 1e4
MAX_PATTERN = 200
# The words for places, and what the paths of their modules look like. A word's beginning
# up to a dot means all that go on from it.
PLACES = {
    "decoder.attention": r"decoder\.layers\.\d+\.self_attn\.[qkvo]_proj",
    "decoder.mlp": r"decoder\.layers\.\d+\.mlp\.(gate|up|down)_proj",
    "decoder.experts": r"decoder\.layers\.\d+\.mlp\.switch_mlp\.(gate|up|down)_proj",
    "vision.attention": r"vision\.layers\.\d+\.self_attn\.(q|k|v|out)_proj",
    "vision.mlp": r"vision\.layers\.\d+\.mlp\.fc[123]",
    "connector": r"connector\..+",
    "head": r"decoder\.(embed_tokens|lm_head)",
}
_BLOCK = re.compile(r"(\w+\.layers)\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Section):
    """What ``attach`` puts beside a model's layers.

    Attributes:
        kind: low-rank matrices added to weights, or (DoRA) to the weights' directions,
            whose lengths are learned too.
        rank: inner width of the two matrices.
        scale: what their product is multiplied by: mlx-lm's ``scale``, and in PEFT's
            words ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora``.
        dropout: share of a layer's input that the matrices do not see in training.
        layers: how many of the last blocks of each tower have them, None for all.
        where: words of ``PLACES``, ``decoder`` and ``vision`` for all of theirs, or
            regular expressions of whole paths. By default all linear layers of the
            decoder's blocks, but the routers.
    """

    kind: Literal["lora", "dora"] = "lora"
    rank: int = 8
    scale: float = 2.0
    dropout: float = 0.0
    layers: int | None = None
    where: tuple[str, ...] = ("decoder",)

    def __post_init__(self) -> None:
        check_sizes(self, MAX_RANK, "rank")
        if self.layers is not None:
            check_sizes(self, 10_000, "layers")
        require(
            0 < abs(self.scale) <= MAX_SCALE,
            f"AdapterConfig.scale: {self.scale} is 0 or beyond {MAX_SCALE:g}",
        )
        require(
            0 <= self.dropout < 1,
            f"AdapterConfig.dropout: {self.dropout} is not a share from 0 up to 1",
        )
        require(bool(self.where), "AdapterConfig.where: names no place")
        for word in self.where:
            _pattern(word)

    def chosen(self, paths: Iterable[str]) -> list[str]:
        """Those of a model's paths that the config names."""
        paths, patterns = list(paths), [_pattern(word) for word in self.where]
        count: dict[str, int] = {}
        for path in paths:
            if block := _BLOCK.match(path):
                count[block[1]] = max(count.get(block[1], 0), int(block[2]) + 1)

        def is_late(path: str) -> bool:
            block = _BLOCK.match(path)
            if self.layers is None or block is None:
                return True
            return int(block[2]) >= count[block[1]] - self.layers

        return [
            path
            for path in paths
            if is_late(path) and any(p.fullmatch(path) for p in patterns)
        ]


def _pattern(word: str) -> re.Pattern[str]:
    """What the paths of a place look like.

    Raises:
        ConfigError: it is neither a word nor a regular expression.
    """
    named = [p for name, p in PLACES.items() if f"{name}.".startswith(f"{word}.")]
    if named:
        return re.compile("|".join(named))
    # A bare word would match nothing, which is no way to say that it is unknown.
    known = sorted({*PLACES, *(name.partition(".")[0] for name in PLACES)})
    require(
        re.fullmatch(r"[\w.]*", word) is None or re.search(r"\w\.\w", word) is not None,
        f"AdapterConfig.where: {word!r:.80} is not one of {known}, nor a regular "
        "expression of paths",
    )
    require(
        len(word) <= MAX_PATTERN,
        f"AdapterConfig.where: {word[:40]!r}... is longer than {MAX_PATTERN} characters",
    )
    try:
        return re.compile(word)
    except re.error as error:
        require(False, f"AdapterConfig.where: {word!r} cannot be read ({error})")
        raise
