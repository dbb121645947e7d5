"""The fields of requests: what each may be, in one place for the checks and the manual.

A field that is not here is refused by name. ``null`` stands for a field's default, as with
OpenAI.

Source: https://platform.openai.com/docs/api-reference
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from mm1_mlx.answer import MAX_TOKENS, MAX_TOP_LOGPROBS

from .policy import MAX_PARALLEL

# Bounds of what one request may ask for.
MAX_MESSAGES = 1_000
MAX_PARTS = 1_000
MAX_STOPS = 4
MAX_STOP_LENGTH = 256
MAX_BIASES = 300
MAX_CHOICES = MAX_PARALLEL
MAX_NAME = 64
MAX_COMPLETION_LOGPROBS = 5
MAX_INPUTS = 256
# Of /v1/completions, as OpenAI's.
COMPLETION_TOKENS = 16

StopWord = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_LENGTH)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TOKEN_ID = "^[0-9]{1,9}$"
TokenId = Annotated[str, StringConstraints(pattern=TOKEN_ID)]
NAME = f"^[a-zA-Z0-9_-]{{1,{MAX_NAME}}}$"
# What a text that matches is.
PATTERNS = {
    TOKEN_ID: "the number of a token",
    NAME: f"1 to {MAX_NAME} letters, digits, dashes and underscores",
}


class Fields(BaseModel):
    """An object of a request."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class TextPart(Fields):
    """A stretch of text."""

    type: Literal["text"]
    text: str
    """the text"""


class ImageURL(Fields):
    """Where a picture is, and how closely it is looked at."""

    url: str
    """a data URI, `data:image/png;base64,...`; where the server allows it an https URL of a
    named host, or a file:// URL below its media root"""
    detail: Literal["auto", "low", "high"] | None = None
    """`low`: one tile; `auto`: the model's own mode; `high`: as many tiles as the model can
    take; `/v1/models` says what these are"""


class ImagePart(Fields):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageURL
    """the picture"""


UserPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]
TextParts = Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS)]
UserParts = Annotated[list[UserPart], Field(min_length=1, max_length=MAX_PARTS)]


# Of answers, to questions that cannot be put here: clients send them back with the rest.
Nothing = Annotated[list[Any], Field(max_length=0)] | None


class AnyMessage(Fields):
    """What all messages may have."""

    name: None = None
    """null alone; names are not supported"""


class SystemMessage(AnyMessage):
    """How the model is to behave."""

    role: Literal["system", "developer"]
    """`developer` is read as `system`"""
    content: str | TextParts
    """text, or a list of texts"""


class UserMessage(AnyMessage):
    """What the user says and shows."""

    role: Literal["user"]
    content: str | UserParts
    """text, or a list of texts and pictures in the order they stand"""


class AssistantMessage(AnyMessage):
    """What the model answered before, or an example of what it should."""

    role: Literal["assistant"]
    content: str | TextParts
    """text, or a list of texts"""
    refusal: None = None
    """null alone, as in an answer"""
    audio: None = None
    """null alone"""
    function_call: None = None
    """null alone"""
    tool_calls: Nothing = None
    """null or empty; tools are not supported"""
    annotations: Nothing = None
    """null or empty"""


Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")
]


class TextFormat(Fields):
    """Any text."""

    type: Literal["text"]


class JSONObjectFormat(Fields):
    """A JSON object."""

    type: Literal["json_object"]


class JSONSchema(Fields):
    """A JSON schema and its name."""

    name: Annotated[str, StringConstraints(pattern=NAME)]
    """what the schema is called"""
    description: str | None = None
    """not shown to the model"""
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    """the schema; without one any JSON is right"""
    strict: bool | None = None
    """answers always keep to the schema"""


class JSONSchemaFormat(Fields):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: JSONSchema
    """the schema"""


Format = Annotated[
    TextFormat | JSONObjectFormat | JSONSchemaFormat, Field(discriminator="type")
]


class StreamOptions(Fields):
    """What a stream holds beside the answer."""

    include_usage: bool | None = None
    """end with a chunk without choices that has the usage and timings"""


class ModelRequest(Fields):
    """What is asked of a model."""

    model: str | None = None
    """the served model's id, from `/v1/models`"""


class Sampling(ModelRequest):
    """What both kinds of answers may be asked with."""

    stream: bool | None = None
    """send the answer as server-sent events while it is written"""
    stream_options: StreamOptions | None = None
    """with `stream` only"""
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    """how many answers, at most as many as the server decodes at once (default 1)"""
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    """makes an answer repeatable; the answer number i draws with `seed` + i"""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 always takes the likeliest token (default 1)"""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """draw from the likeliest tokens of this much probability together (default 1)"""
    stop: (
        StopWord
        | Annotated[list[StopWord], Field(min_length=1, max_length=MAX_STOPS)]
        | None
    ) = None
    """the answer ends before the first of these"""
    logit_bias: Annotated[dict[TokenId, Bias], Field(max_length=MAX_BIASES)] | None = (
        None
    )
    """added to the logits of tokens, by their ids"""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """taken from the logits of tokens that the answer holds already"""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """taken from them as often as the answer holds them"""


class ChatRequest(Sampling):
    """A question to `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    """the conversation"""
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    """the older name of `max_completion_tokens`"""
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    """longest answer, in tokens (default: the server's `--max-tokens`)"""
    logprobs: bool | None = None
    """give every token's log probability"""
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    """and that of so many likeliest tokens in its place"""
    response_format: Format | None = None
    """what the answer is held to"""


class CompletionRequest(Sampling):
    """A text to go on with, for `/v1/completions`."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]
    """text, or texts that are each gone on with; no chat template is put around them"""
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = Field(
        None, description=f"longest answer, in tokens (default {COMPLETION_TOKENS})"
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_COMPLETION_LOGPROBS)] | None = None
    """give every token's log probability, and that of so many likeliest tokens"""


class EmbeddingRequest(ModelRequest):
    """Texts and pictures for `/v1/embeddings`."""

    input: (
        str
        | Annotated[list[str | ImagePart], Field(min_length=1, max_length=MAX_INPUTS)]
    )
    """a text, or texts and pictures (`image_url` parts as in chat messages)"""
    encoding_format: Literal["float", "base64"] | None = None
    """`base64` is of float32 numbers, little end first (default `float`)"""
