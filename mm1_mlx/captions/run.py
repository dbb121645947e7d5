"""Pictures, a prompt and a model into captions, kept as they are written."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mm1_mlx.answer import Answer, Piece, Settings, join
from mm1_mlx.batch import SIZE, Ask, made_ready, stream_batch
from mm1_mlx.captions.folder import Pictures
from mm1_mlx.captions.store import Row, Store
from mm1_mlx.errors import MM1Error, PromptError
from mm1_mlx.messages import Message
from mm1_mlx.resolution import name_mode
from mm1_mlx.runtime import Runtime, forecast

PROMPT = "Describe the picture."


@dataclass(frozen=True)
class Asked:
    """What is asked about every picture.

    Attributes:
        prompt: the question.
        system: the system message, or None.
        max_tokens: how long a caption may become.
        temperature: 0 takes the likeliest token.
        top_p: draws from the likeliest tokens of this much probability together.
        seed: of the drawing, the same for every picture; None for another each time.
        schema: a JSON schema that every answer is held to, or None.
    """

    prompt: str = PROMPT
    system: str | None = None
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    schema: Mapping[str, Any] | None = None

    def messages(self, *parts: Mapping[str, Any]) -> list[Message]:
        """The conversation: the system message, the parts, then the prompt."""
        text = {"type": "text", "text": self.prompt}
        user: Message = {"role": "user", "content": [*parts, text]}
        return (
            [{"role": "system", "content": self.system}, user]
            if self.system
            else [user]
        )

    @property
    def settings(self) -> Settings:
        """How every answer is given."""
        return Settings(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            schema=self.schema,
        )


def record(runtime: Runtime, asked: Asked) -> dict[str, Any]:
    """What decides the captions, as JSON values."""
    return {
        "model": runtime.path.name,
        "adapters": [f"{name}:{scale:g}" for name, scale in runtime.adapters],
        "resolution": name_mode(runtime.config.image) if runtime.config.image else None,
        **asdict(asked),
        "digest": runtime.digest,
    }


def caption(
    runtime: Runtime,
    pictures: Pictures,
    asked: Asked,
    store: Store,
    *,
    size: int = SIZE,
) -> Iterator[tuple[str, Row]]:
    """What comes of every picture that ``store`` has nothing of, when it is kept there.

    A picture that cannot be read gives a row with its ``error``, and the others go on.

    Args:
        runtime: from ``load``.
        pictures: the pictures.
        asked: what is asked about each.
        store: where captions are kept, one by one as they end.
        size: how many are under way at once: what a killed run has to ask again.

    Raises:
        PromptError: the question cannot be asked about any picture.
        DataError: a caption cannot be kept.
    """
    _check(runtime, asked)
    done = store.done()
    left = [name for name in pictures.names if name not in done]
    # No picture is begun before those that ended are kept.
    places = threading.Semaphore(size)
    try:
        for name, row in _rows(runtime, pictures, left, asked, size, places):
            store.add(name, row)
            places.release()
            yield name, row
    finally:
        # The model's thread may be waiting for a place.
        places.release(size)


def _check(runtime: Runtime, asked: Asked) -> None:
    """Refuse what would be refused of every picture."""
    if runtime.config.image is None:
        raise PromptError("the model takes text only; give one that sees pictures")
    forecast(runtime, asked.messages(), max_tokens=asked.max_tokens)
    if asked.schema is not None:
        runtime.engine.grammars.constraint(asked.schema)


def _rows(
    runtime: Runtime,
    pictures: Pictures,
    names: list[str],
    asked: Asked,
    size: int,
    places: threading.Semaphore,
) -> Iterator[tuple[str, Row]]:
    """What comes of each picture, in the order in which answers end."""

    def asks() -> Iterator[Ask]:
        for name in names:
            image = {"type": "image", "image": pictures.folder / name}
            yield Ask(asked.messages(image), (), asked.settings)

    def begun() -> Iterator[Ask]:
        for ask in made_ready(runtime, asks()):
            places.acquire()
            yield ask

    pieces: dict[int, list[Piece]] = {}
    for number, piece in stream_batch(runtime, begun(), size=size):
        if isinstance(piece, MM1Error):
            pieces.pop(number, None)
            yield names[number], {"error": str(piece)}
            continue
        pieces.setdefault(number, []).append(piece)
        if piece.finish_reason is not None:
            yield names[number], _row(join(pieces.pop(number)), asked)


def _row(answer: Answer, asked: Asked) -> Row:
    text, reason = answer.text.strip(), answer.finish_reason
    if asked.schema is None:
        return {"caption": text, "finish_reason": reason}
    if reason != "stop":
        return {
            "error": f"the answer had not ended after {len(answer.tokens)} tokens; "
            "--max-tokens lets it be longer",
            "finish_reason": reason,
        }
    return {"data": json.loads(text), "finish_reason": reason}
