"""``/v1/embeddings``: texts and pictures to vectors of CLIP's space."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from mm1_mlx.embed import Embedder, Vectors, count_tokens, embed_images, embed_texts
from mm1_mlx.errors import MM1Error

from .errors import APIError
from .fields import EmbeddingRequest, ImagePart
from .pictures import read_picture
from .replies import Embedding, EmbeddingList, EmbeddingUsage
from .service import Service, respond, unless_left

Input = str | bytes


async def embed(request: Request) -> Response:
    """The vectors of texts and pictures."""
    service: Service = request.app.state.service
    async with service.bodies.read(request) as body:
        fields = await service.read(body, EmbeddingRequest)
        service.check_model(fields.model)
        async with service.keeper.use() as loaded:
            embedder, worker = loaded.embedder, loaded.worker
            if embedder is None or worker is None:
                raise APIError(
                    400,
                    f"the model {service.name!r} has no embeddings; serve a CLIP model",
                    param="model",
                    code="model_cannot_embed",
                )
            given = [fields.input] if isinstance(fields.input, str) else fields.input
            texts = {i: x for i, x in enumerate(given) if isinstance(x, str)}
            pictures = {}
            for i, part in enumerate(given):
                if isinstance(part, ImagePart):
                    param = f"input[{i}].image_url.url"
                    url = part.image_url.url
                    pictures[i] = await read_picture(url, service.policy, param)
            work = asyncio.wrap_future(worker.submit(_embed, embedder, texts, pictures))

            async def vectors() -> tuple[dict[int, Any], int]:
                try:
                    return await work
                except MM1Error as error:
                    raise APIError(400, str(error), param="input") from error

            found, tokens = await unless_left(request, vectors())
    as_text = fields.encoding_format == "base64"
    return respond(
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
    embedder: Embedder, texts: dict[int, str], pictures: dict[int, Input]
) -> tuple[dict[int, Any], int]:
    """The vectors by the inputs' numbers, and how many tokens the texts have."""
    found: dict[int, Any] = {}
    tokens = 0
    if texts:
        rows: Vectors = embed_texts(embedder, [*texts.values()])
        found |= dict(zip(texts, rows, strict=True))
        tokens = count_tokens(embedder, [*texts.values()])
    if pictures:
        rows = embed_images(embedder, [*pictures.values()])
        found |= dict(zip(pictures, rows, strict=True))
    return found, tokens


def _write(vector: Any, as_text: bool) -> list[float] | str:
    if as_text:
        return base64.b64encode(vector.astype(np.dtype("<f4")).tobytes()).decode()
    # The shortest decimals that are the same float32.
    return [float(str(x)) for x in vector]
