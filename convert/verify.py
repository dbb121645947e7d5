"""A converted model beside its source, stage by stage: pixels to greedy tokens."""

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step
from numpy.typing import NDArray

from mm1_mlx.checkpoint import load_config, load_model
from mm1_mlx.config import MM1Config
from mm1_mlx.errors import CheckpointError, ConfigError
from mm1_mlx.models import MM1
from mm1_mlx.prompt import Prompt
from mm1_mlx.runtime import TINY
from mm1_mlx.tokenizer import load_tokenizer

from .source import Source

PICTURE = TINY / "four-shapes.png"
QUESTION = "What is in this picture?"
TOLERANCE = 1e-4
# Pixels are compared with those of another implementation of the same resampling.
PIXEL_TOLERANCE = 1e-5
NUM_TOKENS = 32

Arrays = dict[str, NDArray[Any]]


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
    model = load_model(path, mx.float32)
    prompt = _prompt(path, config, picture)
    request = _request(prompt, picture, NUM_TOKENS)
    ours = _stages(model, prompt)
    del model
    mx.clear_cache()
    with Source(source) as opened:
        # The weights too, where they are not here yet.
        assert opened.tensors
        theirs = _ask(request | {"source": np.array(str(opened.folder))})
    stages = tuple(
        Stage(name, _difference(ours[name], theirs[name]), tolerance)
        for name, tolerance in (
            *(("pixels", PIXEL_TOLERANCE), ("vision", TOLERANCE)),
            *(("connector", TOLERANCE), ("logits", TOLERANCE)),
        )
        if name in ours and name in theirs
    )
    equal = None
    if "greedy" in ours and "greedy" in theirs:
        same = ours["greedy"] == theirs["greedy"]
        equal = NUM_TOKENS if same.all() else int(same.argmin())
    versions = {name: str(theirs[name]) for name in ("torch", "transformers")}
    versions["mlx"] = mx.__version__
    return Parity(source, stages, equal, NUM_TOKENS, versions)


def _prompt(path: Path, config: MM1Config, picture: Path) -> Prompt:
    if config.decoder is None or config.prompt is None:
        if config.image is None or config.vision is None:
            raise ConfigError(f"{path} has neither a decoder nor an encoder to compare")
        from mm1_mlx.image import load_pictures

        return Prompt((), (), tuple(load_pictures([picture], config.image)))
    tokenizer = load_tokenizer(path, config.prompt)
    images = [picture] if config.sees else []
    return Prompt.build(QUESTION, images, config, tokenizer)


def _request(prompt: Prompt, picture: Path, num_tokens: int) -> Arrays:
    places = [i for span in prompt.spans for i in range(span.start, span.stop)]
    request: dict[str, Any] = {
        "tokens": np.array(prompt.tokens, np.int64),
        "places": np.array(places, np.int64),
        "num_tokens": num_tokens,
        "picture": str(picture),
    }
    for shown in prompt.pictures:
        request |= {"tiles": np.stack(shown.tiles), "size": shown.size}
    return {name: np.asarray(value) for name, value in request.items()}


def _stages(model: MM1, prompt: Prompt) -> Arrays:
    """Our arrays of every stage that the model has."""
    made: Arrays = {}
    for shown in prompt.pictures:
        tiles = mx.array(np.stack(shown.tiles))
        features = model.vision(tiles)
        made |= {"pixels": np.array(tiles).transpose(0, 3, 1, 2)}
        made |= {"vision": np.array(features)}
        if "connector" in model:
            made["connector"] = np.array(model.connector(features))
    if "decoder" not in model:
        return made
    tokens = mx.array(prompt.tokens)
    embeddings = model.embed(tokens, model.encode(prompt.pictures), prompt.spans)
    made["logits"] = np.array(model(tokens[None], None, embeddings[None])[0])
    steps = generate_step(
        tokens, model, max_tokens=NUM_TOKENS, input_embeddings=embeddings
    )
    made["greedy"] = np.array([int(token) for token, _ in steps])
    return made


def _ask(request: Mapping[str, NDArray[Any]]) -> Arrays:
    """The reference's arrays, from a child process."""
    script = Path(__file__).with_name("reference.py")
    with tempfile.TemporaryDirectory(prefix="mm1-verify-") as scratch:
        asked, answer = (Path(scratch) / name for name in ("request.npz", "result.npz"))
        np.savez(asked, **request)  # type: ignore[arg-type]
        # -P: never a module of the current folder.
        command = [sys.executable, "-P", str(script), str(asked), str(answer)]
        child = subprocess.run(command, capture_output=True, text=True, check=False)
        if child.returncode:
            lines = child.stderr.strip().splitlines()
            silent = f"the comparison was ended (status {child.returncode}); is there enough memory?"
            raise CheckpointError(lines[-1] if lines else silent)
        return dict(np.load(answer))


def _difference(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
