"""What a model folder computes of one picture and question, and what its source does."""

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step
from numpy.typing import NDArray

from mm1_mlx.config import MM1Config
from mm1_mlx.errors import CheckpointError, ConfigError
from mm1_mlx.image import load_pictures
from mm1_mlx.models import MM1
from mm1_mlx.prompt import Prompt
from mm1_mlx.tokenizer import load_tokenizer

QUESTION = "What is in this picture?"
NUM_TOKENS = 32

Arrays = dict[str, NDArray[Any]]


def build_prompt(path: Path, config: MM1Config, picture: Path) -> Prompt:
    """The question about the picture; of an encoder alone the picture.

    Raises:
        ConfigError: the folder has neither a decoder nor an encoder.
    """
    if config.decoder is None or config.prompt is None:
        if config.image is None or config.vision is None:
            raise ConfigError(f"{path} has neither a decoder nor an encoder to compare")
        return Prompt((), (), tuple(load_pictures([picture], config.image)))
    tokenizer = load_tokenizer(path, config.prompt)
    images = [picture] if config.sees else []
    return Prompt.build(QUESTION, images, config, tokenizer)


def build_request(prompt: Prompt, picture: Path) -> Arrays:
    """What the child process is asked."""
    places = [i for span in prompt.spans for i in range(span.start, span.stop)]
    request: dict[str, Any] = {
        "tokens": np.array(prompt.tokens, np.int64),
        "places": np.array(places, np.int64),
        "num_tokens": NUM_TOKENS,
        "picture": str(picture),
    }
    for shown in prompt.pictures:
        request |= {"tiles": np.stack(shown.tiles), "size": shown.size}
    return {name: np.asarray(value) for name, value in request.items()}


def build_texts(config: MM1Config) -> NDArray[np.int64] | None:
    """Token ids [2, T] for the text tower, each with an end token; None without one."""
    text = config.text
    if text is None:
        return None
    end = text.vocab_size - 1 if text.eos_token_id is None else text.eos_token_id
    length = min(12, text.max_position_embeddings)
    ids = np.random.default_rng(0).integers(0, text.vocab_size, (2, length))
    ids[ids == end] = text.vocab_size // 2
    # One text is shorter: what follows its end does not count.
    ids[0, -1] = ids[1, length // 2] = end
    return ids


def _compare_texts(model: MM1, texts: mx.array, image: NDArray[Any]) -> Arrays:
    """Vectors of the texts, and the scaled cosines of pictures and texts."""
    vectors = np.array(model.text(texts))
    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (image, vectors)]
    scale = np.exp(np.array(model.text.logit_scale))
    return {"text vectors": vectors, "logits": scale * unit[0] @ unit[1].T}


def compute_stages(
    model: MM1, prompt: Prompt, texts: NDArray[np.int64] | None = None
) -> Arrays:
    """Our arrays of every stage that the model has."""
    made: Arrays = {}
    for shown in prompt.pictures:
        tiles = mx.array(np.stack(shown.tiles))
        features = model.vision(tiles)
        made |= {"pixels": np.array(tiles).transpose(0, 3, 1, 2)}
        made |= {"vision": np.array(features)}
        if "projection" in model.vision:
            made["image vectors"] = np.array(model.vision.project(tiles))
        if "connector" in model:
            made["connector"] = np.array(model.connector(features))
    if "text" in model and texts is not None:
        made |= _compare_texts(model, mx.array(texts), made["image vectors"])
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


def ask_source(request: Mapping[str, NDArray[Any]]) -> Arrays:
    """The source's arrays, from a child process.

    Raises:
        CheckpointError: torch is missing, or transformers has no such model.
    """
    script = Path(__file__).with_name("reference.py")
    with tempfile.TemporaryDirectory(prefix="mm1-verify-") as scratch:
        asked, answer = (Path(scratch) / name for name in ("request.npz", "result.npz"))
        np.savez(asked, **request)  # type: ignore[arg-type]
        # -P: never a module of the current folder.
        command = [sys.executable, "-P", str(script), str(asked), str(answer)]
        # Nothing that the child asks for is answered.
        child = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if child.returncode:
            lines = child.stderr.strip().splitlines()
            silent = f"the comparison was ended (status {child.returncode}); is there enough memory?"
            raise CheckpointError(lines[-1] if lines else silent)
        return dict(np.load(answer))
