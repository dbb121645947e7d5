"""The fields of a request to the question that is put to the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mm1_mlx.answer import Settings
from mm1_mlx.batch import Ask

from .errors import APIError
from .fields import (
    COMPLETION_TOKENS,
    AssistantMessage,
    ChatRequest,
    CompletionRequest,
    ImagePart,
    JSONObjectFormat,
    JSONSchemaFormat,
    Sampling,
    SystemMessage,
    UserMessage,
)
from .modes import Views
from .pictures import PictureReader

ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True)
class Question:
    """What the model is asked, and what errors call its parts.

    Attributes:
        asks: the questions.
        field: the request's field that holds them.
        pictures: the fields of their pictures, in order.
    """

    asks: Sequence[Ask]
    field: str
    pictures: Sequence[str] = ()


async def ask_chat(
    request: ChatRequest, reader: PictureReader, views: Views, max_tokens: int
) -> Question:
    """The question of a chat.

    Args:
        request: its fields.
        reader: reads its pictures.
        views: how closely they are looked at.
        max_tokens: the longest answer where none is named.

    Raises:
        APIError: 400; two fields contradict each other, or a picture may not be read.
    """
    most = request.max_completion_tokens
    if request.max_tokens is not None:
        if most is not None and most != request.max_tokens:
            raise _refusal(
                "max_tokens and max_completion_tokens differ; give one", "max_tokens"
            )
        most = request.max_tokens
    top = request.top_logprobs
    if top is not None and not request.logprobs:
        raise _refusal("top_logprobs needs logprobs to be true", "top_logprobs")
    settings = Settings(
        max_tokens=most or max_tokens,
        schema=_schema(request),
        top_logprobs=(top or 0) if request.logprobs else None,
        **_sampling(request),
    )
    pictures = [
        f"messages[{i}].content[{j}].image_url.url"
        for i, message in enumerate(request.messages)
        if not isinstance(message.content, str)
        for j, part in enumerate(message.content)
        if isinstance(part, ImagePart)
    ]
    reader.check_number(len(pictures), "messages")
    fields = iter(pictures)
    messages = [
        await _message(message, fields, reader, views) for message in request.messages
    ]
    return Question([Ask(messages, (), settings)], "messages", pictures)


def ask_completions(request: CompletionRequest) -> Question:
    """The questions of texts that are gone on with."""
    settings = Settings(
        max_tokens=request.max_tokens or COMPLETION_TOKENS,
        top_logprobs=request.logprobs,
        raw=True,
        **_sampling(request),
    )
    prompts = request.prompt
    texts = [prompts] if isinstance(prompts, str) else prompts
    return Question([Ask(text, (), settings) for text in texts], "prompt")


def choices_of(request: Sampling, size: int, questions: int = 1) -> int:
    """How many answers to each question are wanted.

    Raises:
        APIError: 400; all together are more than are decoded at once.
    """
    count = request.n or 1
    if count * questions > size:
        field = "n" if count > 1 else "prompt"
        raise _refusal(
            f"{field} asks for {count * questions} answers, this server gives at most "
            f"{size} at once",
            field,
        )
    return count


def tells_usage(request: Sampling) -> bool:
    """Whether a stream is to end with what its answers took.

    Raises:
        APIError: 400; it is said of no stream.
    """
    options = request.stream_options
    if options is not None and not request.stream:
        raise _refusal("stream_options needs stream to be true", "stream_options")
    return options is not None and bool(options.include_usage)


def _sampling(request: Sampling) -> dict[str, Any]:
    seed, stop = request.seed, request.stop
    return {
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        # Below zero as two's complement.
        "seed": None if seed is None else seed % 2**64,
        "stop": [stop] if isinstance(stop, str) else stop or [],
        "logit_bias": {int(t): x for t, x in (request.logit_bias or {}).items()},
        "presence_penalty": request.presence_penalty or 0.0,
        "frequency_penalty": request.frequency_penalty or 0.0,
    }


def _schema(request: ChatRequest) -> dict[str, Any] | None:
    wanted = request.response_format
    if isinstance(wanted, JSONObjectFormat):
        return ANY_OBJECT
    if isinstance(wanted, JSONSchemaFormat):
        return wanted.json_schema.schema_ or {}
    return None


async def _message(
    message: SystemMessage | UserMessage | AssistantMessage,
    fields: Iterator[str],
    reader: PictureReader,
    views: Views,
) -> dict[str, Any]:
    role = "system" if isinstance(message, SystemMessage) else message.role
    if isinstance(message.content, str):
        return {"role": role, "content": message.content}
    parts: list[dict[str, Any]] = []
    for part in message.content:
        if isinstance(part, ImagePart):
            picture = await reader.read(part.image_url.url, next(fields))
            shown = views.show(picture, part.image_url.detail)
            parts.append({"type": "image", "image": shown})
        else:
            parts.append({"type": "text", "text": part.text})
    return {"role": role, "content": parts}


def _refusal(message: str, param: str) -> APIError:
    return APIError(400, message, param=param, code="invalid_value")
