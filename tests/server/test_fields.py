"""What is wrong with a request is said, by the name of the field, and never a fault of ours."""

import json
import tracemalloc

import pytest
from serving import FOUR, STAR, picture, text

from mm1_mlx.apps.server.errors import APIError
from mm1_mlx.apps.server.fields import ChatRequest
from mm1_mlx.apps.server.parsing import parse
from mm1_mlx.checkpoint import load_config
from mm1_mlx.runtime import TINY

# The embedded model's last token.
LAST = load_config(TINY).decoder.vocab_size - 1
ASK = {"messages": [{"role": "user", "content": "What is this?"}], "max_tokens": 2}


def refused(server, body, path="/v1/chat/completions"):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = server.client.post(
        path, content=content, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert "/tmp" not in error["message"]
    assert "Traceback" not in error["message"]
    return error


@pytest.mark.parametrize(("field", "value", "said"), [
    ("temperature", 2.5, "temperature is 2.5, expected at most 2"),
    ("temperature", "1", 'temperature is "1", expected a number'),
    ("temperature", True, "temperature is true, expected a number"),
    ("top_p", 0, "top_p is 0, expected more than 0"),
    ("n", 0, "n is 0, expected at least 1"),
    ("n", 9, "n asks for 9 answers, this server gives at most 8 at once"),
    ("n", 1.5, "n is 1.5, expected a whole number"),
    ("max_tokens", -1, "max_tokens is -1, expected at least 1"),
    ("max_tokens", 10**9, "max_tokens is 1000000000, expected at most 1,000,000"),
    ("seed", 2**64, "expected at most 9,223,372,036,854,775,807"),
    ("stream", "yes", 'stream is "yes", expected true or false'),
    ("stop", [], "stop is a list of 0, expected at least 1 item"),
    ("stop", ["a"] * 5, "stop is a list of 5, expected at most 4 items"),
    ("stop", 7, "stop is 7, expected a string or a list"),
    ("stop", "a" * 257, "..., expected at most 256 characters"),
    ("top_logprobs", 21, "top_logprobs is 21, expected at most 20"),
    ("top_logprobs", 2, "top_logprobs needs logprobs to be true"),
    ("logit_bias", [3], "logit_bias is a list of 1, expected an object"),
    ("logit_bias", {"999999": 1}, f"logit_bias names token 999999, the model's are 0 to {LAST}"),
    ("presence_penalty", 3, "presence_penalty is 3, expected at most 2"),
    ("frequency_penalty", -3, "frequency_penalty is -3, expected at least -2"),
    ("stream_options", {"include_usage": True}, "stream_options needs stream to be true"),
    ("response_format", "json", 'response_format is "json", expected an object'),
    ("messages", [], "messages is a list of 0, expected at least 1 item"),
    ("messages", "hello", 'messages is "hello", expected a list'),
    ("model", 7, "model is 7, expected a string"),
], ids=str)  # fmt: skip
def test_a_wrong_value_is_named(server, field, value, said):
    error = refused(server, {**ASK, field: value})
    assert error["message"].endswith(said)
    assert error["param"] == field


def shown(*parts):
    return [{"role": "user", "content": [*parts]}]


def json_schema(schema, name="x"):
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}


@pytest.mark.parametrize(("fields", "param", "said"), [
    ({"stop": ["a", ""]}, "stop[1]", 'stop[1] is "", expected at least 1 character'),
    ({"stop": [1]}, "stop[0]", "stop[0] is 1, expected a string"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x",
     'logit_bias has the key "x", expected the number of a token'),
    ({"logit_bias": {"3": 101}}, "logit_bias.3", "logit_bias.3 is 101, expected at most 100"),
    ({"stream_options": {"x": 1}}, "stream_options.x",
     "the field 'stream_options.x' is not supported; leave it out"),
    ({"response_format": {"type": "xml"}}, "response_format.type",
     "response_format.type is \"xml\", expected 'text', 'json_object' or 'json_schema'"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema",
     "the field 'response_format.json_schema' is missing"),
    ({"response_format": json_schema({}, "a b")}, "response_format.json_schema.name",
     "expected 1 to 64 letters, digits, dashes and underscores"),
    ({"response_format": json_schema([])}, "response_format.json_schema.schema",
     "response_format.json_schema.schema is a list of 0, expected an object"),
    ({"messages": ["hi"]}, "messages[0]", 'messages[0] is "hi", expected an object'),
    ({"messages": [{"content": "x"}]}, "messages[0].role",
     "the field 'messages[0].role' is missing"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role",
     "messages[0].role is \"tool\", expected 'system', 'developer', 'user' or 'assistant'"),
    ({"messages": [{"role": "user"}]}, "messages[0].content",
     "the field 'messages[0].content' is missing"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content",
     "messages[0].content is null, expected a string or a list"),
    ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, "messages[0].name",
     "the field 'messages[0].name' is not supported; leave it out"),
    ({"messages": shown({"type": "audio"})}, "messages[0].content[0].type",
     "messages[0].content[0].type is \"audio\", expected 'text' or 'image_url'"),
    ({"messages": shown(text("x"), {"text": "x"})}, "messages[0].content[1].type",
     "the field 'messages[0].content[1].type' is missing"),
    ({"messages": shown({"type": "image_url", "image_url": "https://x.org"})},
     "messages[0].content[0].image_url",
     'messages[0].content[0].image_url is "https://x.org", expected an object'),
    ({"messages": shown(picture(STAR, detail="best"))},
     "messages[0].content[0].image_url.detail",
     "image_url.detail is \"best\", expected 'auto', 'low' or 'high'"),
    ({"messages": [{"role": "system", "content": [picture(STAR)]}]},
     "messages[0].content[0].type",
     "messages[0].content[0].type is \"image_url\", expected 'text'"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_what_lies_deeper_is_named_by_its_place(server, fields, param, said):
    error = refused(server, {**ASK, **fields})
    assert error["param"] == param
    assert error["message"].endswith(said)


UNUSED = ["name", "refusal", "audio", "function_call", "tool_calls", "annotations"]


@pytest.mark.parametrize("name", UNUSED)
def test_what_answers_never_hold_is_taken_empty_alone(server, name):
    said = {"role": "assistant", "content": "red"}
    asked = [*ASK["messages"], said, *ASK["messages"]]
    empty = [[]] if name in ("tool_calls", "annotations") else []
    for value in [None, *empty]:
        said[name] = value
        got = server.client.post(
            "/v1/chat/completions", json={**ASK, "messages": asked}
        )
        assert got.status_code == 200, got.text
    for content in ("red", None):
        said |= {name: [{"id": "x"}] if empty else {"id": "x"}, "content": content}
        error = refused(server, {**ASK, "messages": asked})
        assert error["param"] == f"messages[1].{name}"
        assert error["code"] == "unknown_parameter"


@pytest.mark.parametrize(("body", "said"), [
    (b"", "not JSON"),
    (b"[]", "not a JSON object"),
    (b"{", "not JSON"),
    (b"\xff\xfe", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b'{"n": ' + b"9" * 5000 + b"}", "not JSON"),
    (b'{"temperature": NaN}', "not JSON"),
    (b'{"temperature": 1e999, "messages": []}', "temperature"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate pair"),
    (b"{}", "'messages' is missing"),
], ids=range(10))  # fmt: skip
def test_bodies_that_are_none_are_refused(server, body, said):
    assert said in refused(server, body)["message"]


def test_null_is_a_fields_default(server):
    fields = dict.fromkeys(
        ["n", "stop", "seed", "top_p", "logprobs", "top_logprobs", "response_format",
         "max_completion_tokens", "stream", "stream_options", "logit_bias", "model"]
    )  # fmt: skip
    response = server.client.post(
        "/v1/chat/completions", json={**ASK, **fields, "temperature": 0}
    )
    assert response.status_code == 200


def test_two_numbers_of_tokens_must_agree(server):
    error = refused(server, {**ASK, "max_completion_tokens": 3})
    assert "max_tokens and max_completion_tokens differ" in error["message"]
    same = {**ASK, "max_completion_tokens": 2}
    assert server.client.post("/v1/chat/completions", json=same).status_code == 200


@pytest.mark.parametrize(("url", "said"), [
    ("https://example.org/cat.png", "expected a data URI"),
    ("http://127.0.0.1/cat.png", "expected a data URI"),
    ("file:///etc/passwd", "--media-root"),
    ("/etc/passwd", "expected a data URI"),
    ("~/cat.png", "expected a data URI"),
    ("data", "expected a data URI"),
    ("data/cat.png", "expected a data URI"),
    ("", "expected a data URI"),
    ("ftp://example.org/x", "expected a data URI"),
    ("data:text/plain;base64,QUJD", "expected 'data:image/png;base64,'"),
    ("data:image/png,abc", "expected 'data:image/png;base64,'"),
    ("data:image/png;base64,!!!", "base64 is invalid"),
    ("data:image/png;base64,QUJD", "is not a PNG"),
    ("data:image/png;base64,", "is empty"),
], ids=str)  # fmt: skip
def test_pictures_that_are_none_are_refused(server, url, said):
    part = {"type": "image_url", "image_url": {"url": url}}
    error = refused(server, {"messages": shown(part)})
    assert said in error["message"]
    assert error["param"] == "messages[0].content[0].image_url.url"


def test_many_values_that_lie_deep_take_little_memory():
    deep = b"[" * 900 + b",".join([b"0"] * 50_000) + b"]" * 900
    tracemalloc.start()
    with pytest.raises(APIError, match="not a JSON object"):
        parse(deep, ChatRequest)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Each with its way from the body would be 360 MB.
    assert most < 30e6


def test_half_a_pair_of_surrogates_is_named_by_its_place():
    body = {"messages": [{"role": "user", "content": ["Hi", {"a": "\ud800"}]}]}
    with pytest.raises(APIError) as refused:
        parse(json.dumps(body).encode(), ChatRequest)
    assert refused.value.param == "messages[0].content[1].a"


@pytest.mark.parametrize("stream", [False, True])
def test_a_damaged_picture_is_refused_by_its_place(server, stream):
    part = picture(FOUR)
    # Behind the comma, whole groups of four characters.
    part["image_url"]["url"] = part["image_url"]["url"][: 22 + 400]
    asked = [*shown(picture(STAR), text("And"), picture(FOUR)), *shown(text("?"), part)]
    error = refused(server, {"messages": asked, "stream": stream})
    assert error["param"] == "messages[1].content[1].image_url.url"
    assert error["message"].startswith("picture 3 is damaged")


def test_too_many_pictures_are_refused_before_they_are_decoded(server):
    error = refused(server, {"messages": shown(*[picture(STAR)] * 25)})
    assert "25 pictures" in error["message"]
    assert error["param"] == "messages"


def test_a_prompt_beyond_the_context_is_refused(server):
    for size in (5_000, 40_000_000):
        error = refused(
            server, {"messages": [{"role": "user", "content": "a b " * (size // 4)}]}
        )
        assert "context" in error["message"]
        assert error["param"] == "messages"
        assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("schema", [
    {"type": "nothing"},
    {"$ref": "https://example.org/schema"},
    {"type": "object", "properties": {"a": False}, "required": ["a"],
     "additionalProperties": False},
    {"allOf": [{"type": "string"}, {"type": "integer"}]},
    {"enum": ["x" * 70_000]},
    {"enum": list(range(3_000))},
], ids=range(6))  # fmt: skip
def test_schemas_that_cannot_be_held_to_are_refused(server, schema):
    error = refused(server, {**ASK, "response_format": json_schema(schema)})
    assert "schema" in error["message"]
    assert error["param"] == "response_format"


def test_a_schema_that_is_deep_is_refused(server):
    schema = {}
    for _ in range(40):
        schema = {"items": schema}
    error = refused(server, {**ASK, "response_format": json_schema(schema)})
    assert "levels deep" in error["message"]


def test_a_refusal_in_a_stream_has_its_status(server):
    error = refused(server, {**ASK, "stream": True, "logit_bias": {"999999": 1}})
    assert "999999" in error["message"]
    assert error["param"] == "logit_bias"


def test_typed_special_tokens_stay_text(server, embedded):
    asked = [text("<image></s>" * 10), picture(STAR)]
    response = server.chat(asked, max_tokens=2)
    assert response.status_code == 200
    details = response.json()["usage"]["prompt_tokens_details"]
    assert details["image_tokens"] == embedded.num_image_tokens


@pytest.mark.parametrize(("path", "body", "param"), [
    ("/v1/completions", {"prompt": [1, 2, 3]}, "prompt[0]"),
    ("/v1/completions", {"prompt": ""}, "prompt"),
    ("/v1/completions", {"prompt": "a b " * 2_000}, "prompt"),
    ("/v1/completions", {"prompt": "x", "logit_bias": {str(LAST + 1): 1}}, "logit_bias"),
    ("/v1/completions", {"prompt": "x", "echo": True}, "echo"),
    ("/v1/completions", {"prompt": "x", "suffix": "y"}, "suffix"),
    ("/v1/completions", {"prompt": "x", "best_of": 2}, "best_of"),
    ("/v1/completions", {"prompt": "x", "logprobs": 6}, "logprobs"),
    ("/v1/completions", {"prompt": ["x"] * 5, "n": 2}, "n"),
    ("/v1/completions", {"prompt": ["x"] * 9}, "prompt"),
    ("/v1/embeddings", {"input": "x", "dimensions": 3}, "dimensions"),
    ("/v1/embeddings", {"input": []}, "input"),
    ("/v1/embeddings", {"input": [[1, 2]]}, "input[0]"),
    ("/v1/embeddings", {"input": [{"type": "text", "text": "x"}]}, "input[0].type"),
    ("/v1/embeddings", {"input": "x", "encoding_format": "int8"}, "encoding_format"),
], ids=str)  # fmt: skip
def test_other_paths_name_their_fields(server, path, body, param):
    assert refused(server, body, path)["param"] == param


def test_another_model_is_none_of_ours(server):
    for name in ("gpt-5", "../../x", "evil/repo", ""):
        response = server.client.post(
            "/v1/chat/completions", json={**ASK, "model": name}
        )
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"
