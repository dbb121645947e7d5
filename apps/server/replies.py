"""What the server answers, as OpenAI's objects; ``timings`` is ours.

Source: https://platform.openai.com/docs/api-reference
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_serializer

FinishReason = Literal["stop", "length"]


class Reply(BaseModel):
    """An object of an answer."""

    model_config = ConfigDict(
        extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="null"
    )


class Sparse(Reply):
    """An object that is written without the fields that nobody set."""

    @model_serializer(mode="wrap")
    def _written(self, write: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        set_ = self.model_fields_set
        return {k: v for k, v in write(self).items() if v is not None or k in set_}


class Likely(Reply):
    """A token and how likely it was."""

    token: str
    """its text; an incomplete character is U+FFFD"""
    logprob: float
    """natural logarithm of its probability, before temperature, biases and schemas"""
    bytes: list[int]
    """its UTF-8 bytes"""


class TokenLogprob(Likely):
    """A token of the answer, and the likeliest ones in its place."""

    top_logprobs: list[Likely]
    """the likeliest first"""


class Logprobs(Reply):
    """How likely the tokens of an answer were."""

    content: list[TokenLogprob]
    """in their order"""
    refusal: None = None
    """always null"""


class CompletionLogprobs(Reply):
    """How likely the tokens of a completion were."""

    tokens: list[str]
    """their texts"""
    token_logprobs: list[float]
    """of each"""
    top_logprobs: list[dict[str, float]]
    """the likeliest in each place"""
    text_offset: list[int]
    """where each begins, in characters of the completion"""


class PromptDetails(Reply):
    """What the prompt's tokens are."""

    cached_tokens: int
    """known from earlier requests, and not computed again"""
    image_tokens: int
    """of pictures"""


class Usage(Reply):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    """of all answers together"""
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Timings(Reply):
    """How long it took; not of OpenAI's."""

    prompt_tokens: int
    """of the prompt, its pictures included"""
    prompt_seconds: float
    """reading the prompt, encoding its pictures and running both"""
    ttft_seconds: float
    """from the question to the first token, waiting for other answers included"""
    total_seconds: float
    """from the question to the last token"""
    tokens_per_second: float
    """of all answers together, after the first token"""


class ChatMessage(Reply):
    """The answer's message."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None
    """always null"""


class ChatChoice(Reply):
    """An answer."""

    index: int
    message: ChatMessage
    logprobs: Logprobs | None
    finish_reason: FinishReason
    """`stop`: it ended, or a stop string was met; `length`: `max_tokens` or the context"""


class ChatCompletion(Reply):
    """The answers to a question."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    """of weights, config and adapters: with the same, a seed gives the same answer"""
    choices: list[ChatChoice]
    usage: Usage
    timings: Timings


class Delta(Sparse):
    """What is new."""

    role: Literal["assistant"] | None = None
    """in an answer's first chunk"""
    content: str | None = None


class ChatChunkChoice(Reply):
    """A stretch of an answer."""

    index: int
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None
    """in an answer's last chunk"""


class ChatChunk(Sparse):
    """An event of a stream; `data: [DONE]` ends it."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    """one, or none in the chunk of the usage"""
    usage: Usage | None = None
    """with `stream_options.include_usage`: null but in the last chunk"""
    timings: Timings | None = None
    """beside the usage"""


class CompletionChoice(Reply):
    """A text that goes on from the prompt, or a stretch of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(Sparse):
    """The texts that go on from a prompt; also every event of a stream of them."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    """in a stream with `stream_options.include_usage` only, and there as with chats"""
    timings: Timings | None = None
    """beside the usage"""


class Embedding(Reply):
    """A vector of length 1."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str
    """numbers, or base64 of them as float32, little end first"""


class EmbeddingUsage(Reply):
    """Tokens."""

    prompt_tokens: int
    """of the texts"""
    total_tokens: int


class EmbeddingList(Reply):
    """The vectors of the inputs, in their order."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Modes(Reply):
    """The resolution modes that `detail` chooses from; `null` where it takes no pictures."""

    low: str
    auto: str
    high: str


class Abilities(Reply):
    """What the model can do; not of OpenAI's."""

    answers: bool
    """whether it answers chats and completions"""
    embeds: bool
    """whether it has embeddings"""
    context: int | None
    """tokens of a prompt and its answer together"""
    max_choices: int
    """the most that `n` may be"""
    resolution: Modes | None


class Model(Reply):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["mm1_mlx"] = "mm1_mlx"
    mm1: Abilities


class ModelList(Reply):
    """The served model."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(Reply):
    """Whether the server is well."""

    status: Literal["ok", "failed"]
    model: str
    loaded: bool
    """whether the model is in memory; if not, the next request loads it"""


class Error(Reply):
    """What went wrong."""

    message: str
    """one sentence"""
    type: str
    param: str | None
    """the field at fault"""
    code: str | None
    """the fault's name"""


class ErrorReply(Reply):
    """A refusal."""

    error: Error
