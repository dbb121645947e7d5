"""A converted model beside its source, stage by stage: pixels to greedy tokens."""

from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mm1_mlx.checkpoint import load_config, load_model
from mm1_mlx.errors import CheckpointError
from mm1_mlx.runtime import TINY

from .source import Source
from .stages import (
    NUM_TOKENS,
    ask_source,
    build_prompt,
    build_request,
    build_texts,
    compute_stages,
)

PICTURE = TINY / "four-shapes.png"
TOLERANCE = 1e-4
# By stage, in their order. Pixels are compared with another implementation's.
TOLERANCES = {
    "pixels": 1e-5,
    "vision": TOLERANCE,
    "image vectors": TOLERANCE,
    "text vectors": TOLERANCE,
    "connector": TOLERANCE,
    "logits": TOLERANCE,
}


@dataclass(frozen=True)
class Stage:
    """How far a stage is from the source's: the largest difference over the largest value."""

    name: str
    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether it is within the tolerance."""
        return self.difference <= self.tolerance


@dataclass(frozen=True)
class Parity:
    """The stages, and how many of the first greedy tokens are equal."""

    source: str
    stages: tuple[Stage, ...]
    equal_tokens: int | None
    num_tokens: int
    versions: dict[str, str]

    @property
    def passed(self) -> bool:
        """Whether every stage is within its tolerance and all tokens are equal."""
        tokens = self.equal_tokens in (None, self.num_tokens)
        return tokens and all(stage.passed for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        stages = [asdict(stage) | {"passed": stage.passed} for stage in self.stages]
        return asdict(self) | {"stages": stages, "passed": self.passed}


def verify(path: Path, source: str, picture: Path = PICTURE) -> Parity:
    """Compare a model folder with the source it was made from, both in float32.

    Raises:
        CheckpointError: torch is missing, or transformers has no such model.
        ConfigError: the folder has neither a decoder nor an encoder.
    """
    config = load_config(path)
    model = load_model(path, mx.float32, "verify it where there is more")
    prompt = build_prompt(path, config, picture)
    texts = build_texts(config)
    request = build_request(prompt, picture)
    if texts is not None:
        request["texts"] = texts
    ours = compute_stages(model, prompt, texts)
    del model
    mx.clear_cache()
    with Source(source) as opened:
        # The weights too, where they are not here yet.
        assert opened.tensors
        theirs = ask_source(request | {"source": np.array(str(opened.folder))})
    if missing := sorted(set(ours) - set(theirs)):
        raise CheckpointError(
            f"{source} does not give {missing}, which {path} has; compare with the source "
            "that the model was made from"
        )
    stages = tuple(
        Stage(name, _difference(ours[name], theirs[name]), tolerance)
        for name, tolerance in TOLERANCES.items()
        if name in ours
    )
    equal = None
    if "greedy" in ours and "greedy" in theirs:
        same = ours["greedy"] == theirs["greedy"]
        equal = NUM_TOKENS if same.all() else int(same.argmin())
    versions = {name: str(theirs[name]) for name in ("torch", "transformers")}
    versions["mlx"] = version("mlx")
    return Parity(source, stages, equal, NUM_TOKENS, versions)


def _difference(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
