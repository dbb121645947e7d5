"""Answers held to a JSON schema: alone, in a batch, guessed, and what is refused."""

import json
import time

import mlx.core as mx
import pytest

from mm1_mlx import generate, generate_batch, load, stream_batch
from mm1_mlx.answer import Settings
from mm1_mlx.batch import Ask
from mm1_mlx.errors import PromptError
from mm1_mlx.grammar import MAX_BYTES, MAX_DEPTH, MAX_VALUES, Grammars, check_schema
from mm1_mlx.runtime import TINY
from mm1_mlx.sampling import Sampler

STAR, FOUR = TINY / "red-star.png", TINY / "four-shapes.png"
COLOURS = ["red", "green", "blue", "yellow"]
SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": COLOURS},
        "count": {"type": "integer", "minimum": 0, "maximum": 9},
        "round": {"type": "boolean"},
    },
    "required": ["colour", "count", "round"],
    "additionalProperties": False,
}
QUESTIONS = ["What colour is the star?", "How many shapes are there?", "Describe it."]


@pytest.fixture(scope="module")
def runtime():
    with load(TINY, mx.float32) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def grammars(runtime):
    return Grammars(runtime.tokenizer, runtime.config.decoder.vocab_size)


def check_value(text):
    value = json.loads(text)
    assert list(value) == ["colour", "count", "round"]
    assert value["colour"] in COLOURS
    assert value["count"] in range(10)
    assert type(value["count"]) is int
    assert type(value["round"]) is bool
    assert text == json.dumps(value)


@pytest.mark.parametrize("temperature", [0.0, 2.0])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_an_answer_is_json_of_its_schema(runtime, temperature, seed):
    settings = {"schema": SCHEMA, "temperature": temperature, "seed": seed}
    answer = generate(runtime, QUESTIONS[0], images=[STAR], **settings)
    assert answer.finish_reason == "stop"
    check_value(answer.text)


def test_without_a_schema_the_answer_is_none(runtime):
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(generate(runtime, QUESTIONS[0], images=[STAR]).text)


def test_the_model_decides_what_the_schema_leaves_open(runtime):
    question, schema = "How many shapes are there?", {"enum": [4, 1]}
    held = [generate(runtime, question, [x], schema=schema).text for x in (STAR, FOUR)]
    assert held == ["1", "4"]


def asks(temperature):
    settings = [
        Settings(schema=SCHEMA, temperature=temperature, seed=1),
        Settings(temperature=temperature, seed=2),
        Settings(schema={"enum": ["a", "bb"]}, temperature=temperature, seed=3),
        Settings(schema=SCHEMA, temperature=temperature, seed=4, max_tokens=5),
    ]
    return [
        Ask(QUESTIONS[i % 3], [STAR if i % 2 else FOUR], one)
        for i, one in enumerate(settings)
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batchs_answers_are_those_given_alone(runtime, temperature):
    questions = asks(temperature)
    for ask, answer in zip(questions, generate_batch(runtime, questions), strict=True):
        settings = {
            name: getattr(ask.settings, name)
            for name in ("schema", "temperature", "seed", "max_tokens")
        }
        alone = generate(runtime, ask.prompt, ask.images, **settings)
        assert (answer.text, answer.finish_reason) == (alone.text, alone.finish_reason)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guesses_change_nothing(runtime, temperature):
    settings = {"schema": SCHEMA, "temperature": temperature, "seed": 5}
    # The prompt holds what the answer repeats, so that guesses are made, right and wrong.
    prompt = (
        '{"colour": "red", "count": 1, "round": true} {"colour": "blue", "count": 2'
    )
    plain = generate(runtime, prompt, **settings)
    assert generate(runtime, prompt, prompt_lookup=True, **settings).text == plain.text
    check_value(plain.text)


def test_packed_keys_change_nothing_of_the_form(runtime):
    # The batch reads its last token again once it is packed: the grammar goes back too.
    settings = Settings(schema=SCHEMA, kv_bits=8, kv_start=30)
    questions = [Ask(question, [FOUR], settings) for question in QUESTIONS]
    for answer in generate_batch(runtime, questions):
        check_value(answer.text)


def test_an_answer_that_is_cut_says_so(runtime):
    answer = generate(runtime, "Hello", schema=SCHEMA, max_tokens=4)
    assert answer.finish_reason == "length"


def test_a_sampler_that_goes_back_draws_the_same_again(grammars):
    mx.random.seed(0)
    logits = mx.random.normal((12, grammars._vocab_size))
    once = Sampler(1.0, seed=7, constraint=grammars.constraint(SCHEMA))
    expected = [int(once(row[None])) for row in logits]
    several = Sampler(1.0, seed=7, constraint=grammars.constraint(SCHEMA))
    assert several(logits[:5]).tolist() == expected[:5]
    several.rewind(3)
    several.rewind(0)
    assert several(logits[2:7]).tolist() == expected[2:7]
    several.rewind(1)
    assert several(logits[6:]).tolist() == expected[6:]


def test_behind_the_end_only_the_end_may_come(grammars):
    constraint = grammars.constraint({"const": ""})
    quote = grammars._tokenizer.vocabulary['"']
    for token in (quote, quote, 1, 1):
        logits = constraint.mask(mx.zeros(grammars._vocab_size))
        assert logits[token].item() == 0
        constraint.accept(token)
    allowed = constraint.mask(mx.zeros(grammars._vocab_size)) == 0
    assert allowed.sum().item() == 1
    constraint.rewind(3)
    assert constraint.mask(mx.zeros(grammars._vocab_size))[quote].item() == 0


def deep(levels):
    schema = {}
    for _ in range(levels):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "match"),
    [
        ([], "the schema is list, expected a JSON object"),
        ({"enum": [float("nan")]}, "the schema is not JSON"),
        ({"enum": [{1}]}, "the schema is not JSON"),
        ({"const": "\ud800"}, "the schema is not JSON"),
        ({"const": "a" * MAX_BYTES}, "bytes, expected at most 65,536"),
        (deep(MAX_DEPTH), "more than 32 levels deep"),
        ({"enum": list(range(MAX_VALUES))}, "more than 2,000 values"),
        ({"type": "nonsense"}, "cannot be held to: Invalid type"),
        ({"not": {}}, "cannot be held to: Unimplemented keys"),
        ({"$ref": "https://example.org/a.json"}, "cannot be held to: Resource"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "cannot be"),
        ({"allOf": [{"type": "string"}, {"type": "null"}]}, "Unsatisfiable"),
        ({"pattern": "(?=a)b"}, "look-around"),
        ({"pattern": "(" * 30_000}, "cannot be held to"),
    ],
)
def test_what_is_no_usable_schema_is_one_sentence(grammars, schema, match):
    with pytest.raises(PromptError, match=match) as caught:
        grammars.constraint(schema)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "object"},
        {"properties": {"pattern": {"type": "string"}}, "type": "object"},
        deep(MAX_DEPTH - 1),
        {"enum": list(range(MAX_VALUES - 2))},
        {"pattern": "((a{1,100}){1,100}){1,100}"},
        {"pattern": ".*a.{30}b"},
        {"maxLength": 10**9, "minLength": 10**6},
        {"minItems": 10**6, "maxItems": 10**9},
    ],
)
def test_small_schemas_are_taken_and_followed_fast(grammars, schema):
    start = time.perf_counter()
    sampler = Sampler(1.0, seed=1, constraint=grammars.constraint(schema))
    for _ in range(50):
        mx.eval(sampler(mx.zeros((1, grammars._vocab_size))))
    sampler.constraint.check()
    assert time.perf_counter() - start < 2


def test_a_schema_that_is_too_much_ends_its_answer_alone(runtime, monkeypatch):
    runtime.engine.grammars._compiled.clear()
    monkeypatch.setattr("mm1_mlx.grammar.MAX_LEXER_STATES", 500)
    hard = {"type": "string", "pattern": ".*a.{30}b"}
    questions = [
        Ask("Hello", settings=Settings(schema=hard, temperature=1.0, seed=1)),
        Ask(QUESTIONS[0], [STAR]),
    ]
    ended = {}
    for number, piece in stream_batch(runtime, questions):
        ended[number] = piece
    assert isinstance(ended[0], PromptError)
    assert "too complex to follow" in str(ended[0])
    assert ended[1].finish_reason == "stop"
    with pytest.raises(PromptError, match="too complex to follow"):
        generate(runtime, "Hello", schema=hard, temperature=1.0, seed=1)
    runtime.engine.grammars._compiled.clear()


def test_compiled_schemas_are_kept_few(grammars):
    for i in range(20):
        grammars.constraint({"const": i})
    assert len(grammars._compiled) == 8
    kept = grammars._compiled[check_schema({"const": 19})]
    grammars.constraint({"const": 19})
    assert grammars._compiled[check_schema({"const": 19})] is kept


def test_without_the_library_its_extra_is_named(runtime, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    grammars = Grammars(runtime.tokenizer, 512)
    with pytest.raises(PromptError, match=r'pip install "mm1-mlx\[schema\]"'):
        grammars.constraint({})


def test_settings_take_an_object_only():
    with pytest.raises(PromptError, match="schema is 'object', expected"):
        Settings(schema="object")


def test_every_kind_of_tokenizer_is_held(any_tokenizer):
    constraint = Grammars(any_tokenizer, 320).constraint({"enum": ["is"]})
    tokens = []
    while not set(tokens) & any_tokenizer.hf.eos_token_ids:
        tokens.append(int(mx.argmax(constraint.mask(mx.zeros(320)) == 0)))
        constraint.accept(tokens[-1])
    assert any_tokenizer.hf.decode(tokens[:-1]) == '"is"'
