"""OpenAI's own client: every field, whole and streamed, with pictures."""

import json
import math

import openai
import pytest
from serving import FOUR, STAR, data_uri, picture, text

from mm1_mlx import generate, load

QUESTION = [picture(STAR), text("What colour is the star?")]
DESCRIBE = [picture(FOUR), text("Describe the picture.")]
SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "blue"]},
        "count": {"type": "integer", "minimum": 1, "maximum": 9},
        # A property of this name is no regular expression.
        "pattern": {"type": "boolean"},
    },
    "required": ["colour", "count", "pattern"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(server):
    url = f"{server.url}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def runtime():
    with load() as runtime:
        yield runtime


def ask(client, content, **fields):
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(
        model="mm1-tiny", messages=messages, **{"temperature": 0, **fields}
    )


def streamed(client, content, **fields):
    """The texts of a stream by choice, its scores, reasons, and last chunk."""
    texts, scores, reasons, last = {}, {}, {}, None
    for chunk in ask(client, content, stream=True, **fields):
        last = chunk
        for choice in chunk.choices:
            i = choice.index
            texts[i] = texts.get(i, "") + (choice.delta.content or "")
            if choice.logprobs:
                scores.setdefault(i, []).extend(choice.logprobs.content)
            if choice.finish_reason:
                assert i not in reasons
                reasons[i] = choice.finish_reason
    return texts, scores, reasons, last


FIELDS = {
    "nothing": {},
    "short": {"max_tokens": 3},
    "the newer name": {"max_completion_tokens": 3},
    "stop": {"stop": "heart"},
    "stops": {"stop": ["green", "a purple"]},
    "seed": {"temperature": 2.0, "seed": 11},
    "negative seed": {"temperature": 1.3, "seed": -5},
    "top_p": {"temperature": 1.0, "top_p": 0.5, "seed": 3},
    "presence": {"presence_penalty": 2.0},
    "frequency": {"frequency_penalty": 1.5, "temperature": 0.7, "seed": 2},
    "bias": {"logit_bias": {"300": 4.5, "301": -100}},
    "json": {"response_format": {"type": "json_object"}, "max_tokens": 40},
    "schema": {"response_format": {"type": "json_schema", "json_schema": {
        "name": "seen", "strict": True, "schema": SCHEMA}}},
    "any json": {"response_format": {"type": "json_schema", "json_schema": {
        "name": "any", "schema": {}}}, "max_tokens": 12},
    "n": {"n": 3, "temperature": 1.5, "seed": 4, "max_tokens": 12},
    "logprobs": {"logprobs": True, "top_logprobs": 4},
    "all": {"n": 2, "temperature": 0.9, "top_p": 0.95, "seed": 9, "max_tokens": 20,
            "stop": ["square"], "logprobs": True, "top_logprobs": 2,
            "presence_penalty": 0.5, "frequency_penalty": 0.5,
            "logit_bias": {"300": 1.0}},
    "all with a schema": {"n": 2, "temperature": 0.9, "seed": 9, "logprobs": True,
            "presence_penalty": 0.1, "logit_bias": {"300": 1.0},
            "response_format": {"type": "json_schema", "json_schema": {
                "name": "seen", "schema": SCHEMA}}},
}  # fmt: skip


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_a_stream_says_what_the_whole_answer_says(client, fields):
    whole = ask(client, DESCRIBE, **fields)
    texts, scores, reasons, _ = streamed(client, DESCRIBE, **fields)
    assert len(whole.choices) == fields.get("n", 1)
    for choice in whole.choices:
        i = choice.index
        assert texts[i] == choice.message.content
        assert reasons[i] == choice.finish_reason
        if fields.get("logprobs"):
            content = choice.logprobs.content
            assert [s.token for s in scores[i]] == [s.token for s in content]
            joined = b"".join(bytes(s.bytes) for s in content).decode()
            # A token may begin before a stop string and end in it.
            rest = joined.removeprefix(choice.message.content)
            assert len(rest) < len(joined)
            assert not rest or rest in "square"
            assert all(s.logprob <= 0 for s in content)
        else:
            assert choice.logprobs is None
            assert i not in scores


# What the runtime is asked for the same.
ALONE = {
    "nothing": {},
    "short": {"max_tokens": 3},
    "stop": {"stop": ["heart"]},
    "seed": {"temperature": 2.0, "seed": 11},
    "negative seed": {"temperature": 1.3, "seed": 2**64 - 5},
    "top_p": {"temperature": 1.0, "top_p": 0.5, "seed": 3},
    "presence": {"presence_penalty": 2.0},
    "frequency": {"frequency_penalty": 1.5, "temperature": 0.7, "seed": 2},
    "bias": {"logit_bias": {300: 4.5, 301: -100}},
    "schema": {"schema": SCHEMA},
}


@pytest.mark.parametrize("name", ALONE)
def test_answers_are_those_of_the_runtime(client, runtime, name):
    alone = generate(
        runtime,
        "Describe the picture.",
        [FOUR],
        **{"temperature": 0.0, "max_tokens": 1024, **ALONE[name]},
    )
    served = ask(client, DESCRIBE, **FIELDS[name])
    (choice,) = served.choices
    assert choice.message.content == alone.text
    assert choice.finish_reason == alone.finish_reason
    assert served.usage.prompt_tokens == alone.prompt_tokens
    assert served.usage.completion_tokens == len(alone.tokens) + (
        alone.finish_reason == "stop" and name not in ("stop",)
    )


def test_every_field_changes_what_it_should(client):
    plain = ask(client, DESCRIBE).choices[0].message.content
    for name in ("short", "stop", "stops", "seed"):
        changed = ask(client, DESCRIBE, **FIELDS[name]).choices[0].message.content
        assert changed != plain, name
    assert "heart" not in ask(client, DESCRIBE, stop="heart").choices[0].message.content
    forced = ask(client, DESCRIBE, logit_bias={"300": 100}, max_tokens=3)
    assert not plain.startswith(forced.choices[0].message.content)
    # Where the model is shown nothing it is unsure.
    fields = {"temperature": 2, "seed": 3, "n": 4, "max_tokens": 24}

    def drawn(**more):
        several = ask(client, "What is this?", **fields, **more)
        return [choice.message.content for choice in several.choices]

    unmoved = drawn()
    for name in ("presence_penalty", "frequency_penalty"):
        assert drawn(**{name: 2.0}) != unmoved, name
    # So few that the likeliest is left alone.
    fields = {"temperature": 2, "seed": 1, "top_p": 0.0001}
    assert ask(client, DESCRIBE, **fields).choices[0].message.content == plain
    del fields["top_p"]
    assert ask(client, DESCRIBE, **fields).choices[0].message.content != plain


def test_an_answer_is_of_its_schema(client):
    for seed in range(4):
        fields = {**FIELDS["schema"], "temperature": 1.5, "seed": seed}
        answer = json.loads(ask(client, QUESTION, **fields).choices[0].message.content)
        assert set(answer) == {"colour", "count", "pattern"}
        assert answer["colour"] in ("red", "blue")
        assert type(answer["count"]) is int
        assert 1 <= answer["count"] <= 9
        assert type(answer["pattern"]) is bool


def test_choices_draw_with_following_seeds(client):
    fields = {"temperature": 2.0, "max_tokens": 24}
    several = ask(client, DESCRIBE, n=3, seed=4, **fields)
    texts = [choice.message.content for choice in several.choices]
    assert len(set(texts)) == 3
    for i, said in enumerate(texts):
        one = ask(client, DESCRIBE, seed=4 + i, **fields)
        assert one.choices[0].message.content == said
        assert one.system_fingerprint == several.system_fingerprint
    assert several.usage.prompt_tokens == one.usage.prompt_tokens


def test_likeliest_tokens_are_those_that_are_taken(client):
    answer = ask(client, QUESTION, logprobs=True, top_logprobs=20).choices[0]
    for scored in answer.logprobs.content:
        assert len(scored.top_logprobs) == 20
        assert scored.top_logprobs[0].token == scored.token
        assert scored.top_logprobs[0].logprob == scored.logprob
        assert sum(math.exp(t.logprob) for t in scored.top_logprobs) <= 1 + 1e-4


def test_usage_is_told_where_it_is_asked_for(client, runtime, embedded):
    texts, _, _, last = streamed(
        client, QUESTION, stream_options={"include_usage": True}
    )
    assert texts == {0: "red"}
    assert last.choices == []
    alone = generate(runtime, "What colour is the star?", [STAR])
    assert last.usage.prompt_tokens == alone.prompt_tokens
    assert last.usage.completion_tokens == 2
    assert last.usage.prompt_tokens_details.image_tokens == embedded.num_image_tokens
    timings = last.model_extra["timings"]
    assert timings["prompt_tokens"] == alone.prompt_tokens
    assert 0 < timings["prompt_seconds"] <= timings["ttft_seconds"]
    assert timings["ttft_seconds"] <= timings["total_seconds"]
    for chunk in ask(client, QUESTION, stream=True):
        assert "usage" not in chunk.model_fields_set


@pytest.mark.parametrize("dumped", [False, True])
def test_a_conversation_goes_on_and_computes_what_is_new(client, dumped, embedded):
    messages = [
        {"role": "developer", "content": "Answer in one word."},
        {"role": "user", "content": QUESTION},
    ]
    create = client.chat.completions.create
    first = create(model="mm1-tiny", messages=messages, temperature=0)
    # The client's own object, as people append it, or as they keep it: every field of it.
    message = first.choices[0].message
    kept = message.model_dump()
    assert {"audio", "function_call", "tool_calls"} <= kept.keys()
    messages.append(kept if dumped else message)
    messages.append({"role": "user", "content": [text("How many shapes are there?")]})
    second = create(model="mm1-tiny", messages=messages, temperature=0)
    details = second.usage.prompt_tokens_details
    assert details.cached_tokens >= first.usage.prompt_tokens - 1
    assert details.image_tokens == embedded.num_image_tokens


def test_detail_is_taken_and_unknown_ones_are_not(client):
    answers = {
        ask(client, [picture(STAR, detail=detail), QUESTION[1]])
        .choices[0]
        .message.content
        for detail in ("low", "high", "auto")
    }
    # The embedded model has one mode.
    assert answers == {"red"}
    with pytest.raises(openai.BadRequestError, match="detail") as refused:
        ask(client, [picture(STAR, detail="finest"), QUESTION[1]])
    assert refused.value.param == "messages[0].content[0].image_url.detail"


def test_completions_go_on_from_a_text(client, runtime):
    create = client.completions.create
    fields = {"model": "mm1-tiny", "temperature": 0, "max_tokens": 12, "logprobs": 2}
    whole = create(prompt="What colour", **fields)
    alone = generate(runtime, "What colour", raw=True, max_tokens=12)
    (choice,) = whole.choices
    assert choice.text == alone.text
    scores = choice.logprobs
    assert "".join(scores.tokens) == choice.text
    for token, start in zip(scores.tokens, scores.text_offset, strict=True):
        assert choice.text[start:].startswith(token)
    assert all(len(top) == 2 for top in scores.top_logprobs)
    chunks = list(create(prompt="What colour", stream=True, **fields))
    assert "".join(c.text for chunk in chunks for c in chunk.choices) == choice.text
    offsets = [
        o for chunk in chunks for c in chunk.choices for o in c.logprobs.text_offset
    ]
    assert offsets == scores.text_offset


def test_completions_of_several_prompts_come_in_their_order(client):
    create = client.completions.create
    prompts = ["What colour", "How many", "A green"]
    fields = {"model": "mm1-tiny", "temperature": 1, "seed": 5, "max_tokens": 6}
    together = create(prompt=prompts, n=2, **fields)
    counted = 0
    for i, prompt in enumerate(prompts):
        alone = create(prompt=prompt, n=2, **fields)
        texts = [c.text for c in together.choices[2 * i : 2 * i + 2]]
        assert texts == [c.text for c in alone.choices]
        counted += alone.usage.completion_tokens
    assert together.usage.completion_tokens == counted <= 6 * len(together.choices)


def test_the_model_is_listed(client):
    (model,) = client.models.list().data
    assert model.id == "mm1-tiny"
    assert client.models.retrieve("mm1-tiny") == model
    abilities = model.model_extra["mm1"]
    assert abilities["resolution"] == {"low": "96", "auto": "96", "high": "96"}
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.models.retrieve("gpt-5")


@pytest.mark.parametrize("field", [
    {"tools": []}, {"user": "me"}, {"parallel_tool_calls": True}, {"top_k": 3},
    {"functions": []}, {"store": True}, {"metadata": {}}, {"service_tier": "auto"},
    {"prediction": None}, {"reasoning_effort": "low"}, {"modalities": ["text"]},
], ids=lambda field: next(iter(field)))  # fmt: skip
def test_every_other_field_is_refused_by_name(client, field):
    (name,) = field
    with pytest.raises(openai.BadRequestError, match=name) as refused:
        ask(client, QUESTION, extra_body=field)
    assert refused.value.param == name
    assert refused.value.code == "unknown_parameter"


def test_embeddings_are_refused_where_there_are_none(client):
    with pytest.raises(openai.BadRequestError, match="has no embeddings"):
        client.embeddings.create(model="mm1-tiny", input="a cat")


def test_data_uris_may_be_of_other_kinds(client):
    from io import BytesIO

    from PIL import Image

    buffer = BytesIO()
    Image.open(STAR).convert("RGB").save(buffer, "JPEG", quality=95)
    import base64

    url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    part = {"type": "image_url", "image_url": {"url": url}}
    assert ask(client, [part, QUESTION[1]]).choices[0].message.content == "red"
    assert data_uri(STAR).startswith("data:image/png")
