"""What is wrong with a request is said, by the name of the field, and never a fault of ours."""

import json

import pytest
from serving import FOUR, STAR, data_uri, picture, text

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
    ("temperature", 2.5, "less than or equal to 2"),
    ("temperature", "1", "valid number"),
    ("temperature", True, "valid number"),
    ("top_p", 0, "greater than 0"),
    ("n", 0, "greater than or equal to 1"),
    ("n", 9, "at most 8 at once"),
    ("n", 1.5, "valid integer"),
    ("max_tokens", 0, "greater than or equal to 1"),
    ("max_tokens", -1, "greater than or equal to 1"),
    ("seed", 2**64, "less than or equal to"),
    ("stop", [], "at least 1 item"),
    ("stop", [""], "at least 1 character"),
    ("stop", ["a"] * 5, "at most 4"),
    ("stop", 7, "valid string"),
    ("top_logprobs", 21, "less than or equal to 20"),
    ("top_logprobs", 2, "needs logprobs"),
    ("logit_bias", {"x": 1}, "match pattern"),
    ("logit_bias", {"3": 101}, "less than or equal to 100"),
    ("logit_bias", {"999999": 1}, "names token 999999"),
    ("presence_penalty", 3, "less than or equal to 2"),
    ("frequency_penalty", -3, "greater than or equal to -2"),
    ("stream_options", {"include_usage": True}, "needs stream"),
    ("response_format", {"type": "xml"}, "does not match any of the expected tags"),
    ("response_format", {"type": "json_schema"}, "is missing"),
    ("messages", [], "at least 1 item"),
    ("messages", "hello", "valid list"),
    ("messages", [{"role": "tool", "content": "x"}], "does not match any"),
    ("messages", [{"role": "user"}], "is missing"),
    ("messages", [{"role": "user", "content": None}], "null"),
    ("messages", [{"role": "user", "content": "x", "name": "me"}], "not supported"),
    ("messages", [{"role": "user", "content": [{"type": "audio"}]}], "does not match"),
    ("messages", [{"role": "system", "content": [picture(STAR)]}], "text"),
], ids=str)  # fmt: skip
def test_a_wrong_value_is_named(server, field, value, said):
    error = refused(server, {**ASK, field: value})
    assert said in error["message"]
    assert error["param"] is None or error["param"].startswith(field)
    assert field in error["message"]


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
    error = refused(server, {"messages": [{"role": "user", "content": [part]}]})
    assert said in error["message"]


def test_a_damaged_picture_is_refused(server):
    part = picture(FOUR)
    part["image_url"]["url"] = part["image_url"]["url"][: len(data_uri(FOUR)) // 8 * 4]
    error = refused(server, {"messages": [{"role": "user", "content": [part]}]})
    assert "picture" in error["message"]


def test_too_many_pictures_are_refused_before_they_are_decoded(server):
    parts = [picture(STAR)] * 25
    error = refused(server, {"messages": [{"role": "user", "content": parts}]})
    assert "25 pictures" in error["message"]


def test_a_prompt_beyond_the_context_is_refused(server):
    for size in (5_000, 40_000_000):
        error = refused(
            server, {"messages": [{"role": "user", "content": "a b " * (size // 4)}]}
        )
        assert "context" in error["message"]


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
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert "schema" in refused(server, {**ASK, "response_format": wanted})["message"]


def test_a_schema_that_is_deep_is_refused(server):
    schema = {}
    for _ in range(40):
        schema = {"items": schema}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    error = refused(server, {**ASK, "response_format": wanted})
    assert "levels deep" in error["message"]


def test_a_refusal_in_a_stream_has_its_status(server):
    error = refused(server, {**ASK, "stream": True, "logit_bias": {"999999": 1}})
    assert "999999" in error["message"]


def test_typed_special_tokens_stay_text(server):
    asked = [text("<image></s>" * 10), picture(STAR)]
    response = server.chat(asked, max_tokens=2)
    assert response.status_code == 200
    usage = response.json()["usage"]
    assert usage["prompt_tokens_details"]["image_tokens"] == 16


@pytest.mark.parametrize(("path", "body", "param"), [
    ("/v1/completions", {"prompt": [1, 2, 3]}, "prompt"),
    ("/v1/completions", {"prompt": "x", "echo": True}, "echo"),
    ("/v1/completions", {"prompt": "x", "suffix": "y"}, "suffix"),
    ("/v1/completions", {"prompt": "x", "best_of": 2}, "best_of"),
    ("/v1/completions", {"prompt": "x", "logprobs": 6}, "logprobs"),
    ("/v1/completions", {"prompt": ["x"] * 5, "n": 2}, "n"),
    ("/v1/completions", {"prompt": ["x"] * 9}, "prompt"),
    ("/v1/embeddings", {"input": "x", "dimensions": 3}, "dimensions"),
    ("/v1/embeddings", {"input": []}, "input"),
    ("/v1/embeddings", {"input": [[1, 2]]}, "input"),
    ("/v1/embeddings", {"input": "x", "encoding_format": "int8"}, "encoding_format"),
], ids=str)  # fmt: skip
def test_other_paths_name_their_fields(server, path, body, param):
    assert refused(server, body, path)["param"].startswith(param)


def test_another_model_is_none_of_ours(server):
    for name in ("gpt-5", "../../x", "evil/repo", ""):
        response = server.client.post(
            "/v1/chat/completions", json={**ASK, "model": name}
        )
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"
