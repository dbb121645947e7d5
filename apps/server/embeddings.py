"""``/v1/embeddings``: texts and pictures to vectors of CLIP's space."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Iterable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from mm1_mlx.embed import (
    BATCH,
    Embedder,
    Vectors,
    count_tokens,
    embed_images,
    embed_texts,
)
from mm1_mlx.errors import PromptError, blaming
from mm1_mlx.image import DEFAULT_LIMITS, open_picture

from .fields import EmbeddingRequest, ImagePart
from .pictures import PictureReader
from .replies import Embedding, EmbeddingList, EmbeddingUsage
from .service import Service, as_json, refusals, unless_left

# A picture as its data URI, or its bytes.
Source = str | bytes


async def embed(request: Request) -> Response:
    """The vectors of texts and pictures."""
    service: Service = request.app.state.service
    async with AsyncExitStack() as stack:
        fields, loaded = await stack.enter_async_context(
            service.receive(request, EmbeddingRequest)
        )
        embedder, worker = service.embedder(loaded)
        given = [fields.input] if isinstance(fields.input, str) else fields.input
        reader = PictureReader(
            service.policy, stack.enter_context(service.bodies.beside())
        )
        stack.enter_context(service.turns.take())

        async def vectors() -> tuple[dict[int, Any], int]:
            texts = {i: x for i, x in enumerate(given) if isinstance(x, str)}
            pictures: dict[int, Source] = {}
            params = []
            for i, part in enumerate(given):
                if isinstance(part, ImagePart):
                    params.append(f"input[{i}].image_url.url")
                    pictures[i] = await reader.read(part.image_url.url, params[-1])
            gone = threading.Event()
            work = worker.submit(_embed, embedder, texts, pictures, gone)
            try:
                with refusals("input", params):
                    return await asyncio.wrap_future(work)
            finally:
                gone.set()

        found, tokens = await unless_left(request, vectors())
    as_text = fields.encoding_format == "base64"
    return as_json(
        EmbeddingList(
            data=[
                Embedding(index=i, embedding=_write(found[i], as_text))
                for i in range(len(given))
            ],
            model=service.name,
            usage=EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens),
        )
    )


def _embed(
    embedder: Embedder,
    texts: dict[int, str],
    pictures: dict[int, Source],
    gone: threading.Event,
) -> tuple[dict[int, Any], int]:
    """The vectors by the inputs' numbers, and how many tokens the texts have.

    On the model's thread; it ends between two batches once nobody waits.

    Raises:
        PromptError: a picture cannot be read, or all together are too large.
    """
    _check_pixels(pictures.values())
    found: dict[int, Any] = {}
    for some in _batches(texts, gone):
        rows: Vectors = embed_texts(embedder, [texts[i] for i in some])
        found |= dict(zip(some, rows, strict=True))
    first = 1
    for some in _batches(pictures, gone):
        rows = embed_images(embedder, [pictures[i] for i in some], first)
        found |= dict(zip(some, rows, strict=True))
        first += len(some)
    return found, count_tokens(embedder, [*texts.values()])


def _batches(inputs: Iterable[int], gone: threading.Event) -> Iterator[list[int]]:
    """So many numbers at a time, while anybody waits."""
    numbers = list(inputs)
    for start in range(0, len(numbers), BATCH):
        if gone.is_set():
            return
        yield numbers[start : start + BATCH]


def _check_pixels(pictures: Iterable[Source]) -> None:
    """As of the pictures of a question: all together, before one is decoded."""
    limits, total = DEFAULT_LIMITS, 0
    for i, picture in enumerate(pictures):
        with blaming(picture=i):
            image = open_picture(picture, f"picture {i + 1}", limits)
        total += image.width * image.height
    if total > limits.max_total_pixels:
        raise PromptError(
            f"the pictures have {total:,} pixels together, expected at most "
            f"{limits.max_total_pixels:,}; send fewer at a time"
        )


def _write(vector: Any, as_text: bool) -> list[float] | str:
    if as_text:
        return base64.b64encode(vector.astype(np.dtype("<f4")).tobytes()).decode()
    # The shortest decimals that are the same float32.
    return [float(str(x)) for x in vector]
