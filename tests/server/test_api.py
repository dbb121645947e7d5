"""What the server says of itself is what it does: OpenAPI, manual, and other clients."""

import json
from pathlib import Path

import jsonschema_rs
import llm
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llm.default_plugins.openai_models import Chat
from serving import STAR, data_uri, serving

from mm1_mlx.apps.server.openapi import ROUTES, describe
from mm1_mlx.apps.server.policy import Policy
from mm1_mlx.apps.server.reference import reference

ROOT = Path(__file__).parents[2]
# Of every path that takes a body, by what the model can do; and of every other.
CASES = {
    ("answers", "/v1/chat/completions"): 100,
    ("answers", "/v1/completions"): 60,
    ("embeds", "/v1/embeddings"): 60,
}
FEW = 5
MODES = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
CHECKS = [
    schemathesis.checks.not_a_server_error,
    schemathesis.checks.status_code_conformance,
    schemathesis.checks.content_type_conformance,
    schemathesis.checks.response_schema_conformance,
]


@pytest.fixture(scope="module")
def described(server):
    return server.client.get("/openapi.json").json()


def test_the_description_is_of_the_paths_there_are(server, described):
    assert described == json.loads(json.dumps(describe()))
    served = {
        (route.path.replace(":path", ""), method.lower())
        for route in server.app.routes
        for method in route.methods
        if method != "HEAD"
    }
    told = {(route.path, route.method) for route in ROUTES}
    page = {(path, method) for path, method in served - told if path[1:2] != "v"}
    assert served - page == told
    assert {method for _, method in page} <= {"get"}


def test_the_manual_is_of_the_code():
    written = (ROOT / "apps/server/API.md").read_text()
    assert written == reference() + "\n", "run: make api"


def test_every_object_says_what_it_is():
    for name, schema in describe()["components"]["schemas"].items():
        assert schema["description"], name


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of pictures, and what is none of them."""
    folder = tmp_path_factory.mktemp("media").resolve()
    (folder / "star.png").write_bytes(STAR.read_bytes())
    (folder / "broken.png").write_bytes(STAR.read_bytes()[:99])
    (folder / "link.png").symlink_to(STAR)
    return folder


@pytest.fixture(scope="module")
def answers(root):
    with serving(Policy(media_root=root)) as running:
        yield running


@pytest.fixture(scope="module")
def embeds(root, clip_folder):
    with serving(Policy(media_root=root), source=clip_folder) as running:
        yield running


def urls(root):
    """Pictures as requests may name them: some are there, some are not to be read."""
    inside = [f"file://{root}/star.png", "file:///star.png", data_uri(STAR)]
    outside = ["file:///../star.png", "file:///link.png", "file:///%00", "file:///"]
    damaged = ["file:///broken.png", data_uri(STAR)[:99], "data:image/png;base64,"]
    return st.sampled_from([None, *inside, *outside, *damaged])


@pytest.mark.slow
def test_made_up_requests_are_no_fault_of_ours(answers, embeds, root):
    seen = {}
    for name, running in (("answers", answers), ("embeds", embeds)):
        schema = schemathesis.openapi.from_dict(describe())
        schema.config.update(base_url=running.url)
        for operation in schema.get_all_operations():
            made = operation.ok()
            cases = CASES.get((name, made.path), FEW)
            for mode in MODES if made.method.upper() == "POST" else MODES[:1]:
                strategy = made.as_strategy(generation_mode=mode)
                statuses = _run(strategy, cases, urls(root))
                seen[name, made.path, mode.value] = statuses
    assert sum(sum(statuses.values()) for statuses in seen.values()) >= 500
    # What is right is answered, and what is wrong is not.
    for (name, path), cases in CASES.items():
        assert seen[name, path, "positive"].get(200, 0) > cases / 10, (path, seen)
        assert seen[name, path, "negative"].get(400, 0) > cases / 2, (path, seen)


def _run(strategy, cases, urls):
    statuses = {}

    @settings(
        max_examples=cases, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=strategy, url=urls, known=st.booleans())
    def check(case, url, known):
        if isinstance(case.body, dict):
            # A long answer proves nothing more.
            if "input" not in case.body:
                case.body = {"max_tokens": 2, **case.body}
            # Made-up text names no model and no picture, which is soon told.
            if known and isinstance(case.body.get("model"), str):
                case.body = {**case.body, "model": "mm1-tiny"}
            case.body = _showing(case.body, url)
        response = case.call(session=None, timeout=60)
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        streams = response.headers["content-type"][0].startswith("text/event-stream")
        case.validate_response(response, checks=CHECKS)
        if response.status_code == 400:
            # In our words, whatever is wrong: pydantic's all say what "should" be.
            assert " should " not in response.json()["error"]["message"]
        if streams:
            _check_events(case.operation.path, response.text)

    check()
    return statuses


def _check_events(path, text):
    """What the events' text is as JSON, which no check looks into."""
    told = describe()
    ok = told["paths"][path]["post"]["responses"]["200"]["content"]
    event, end = ok["text/event-stream"]["itemSchema"]["oneOf"]
    schema = event["properties"]["data"]["contentSchema"]
    schema |= {"components": told["components"]}
    *held, done = text.strip().split("\n\n")
    assert done == f"data: {end['properties']['data']['const']}"
    for event in held:
        jsonschema_rs.validate(schema, json.loads(event.removeprefix("data: ")))


def _showing(body, url):
    """The body with its pictures' URLs replaced, if there is another."""
    if isinstance(body, list):
        return [_showing(part, url) for part in body]
    if not isinstance(body, dict):
        return body
    body = {key: _showing(value, url) for key, value in body.items()}
    held = body.get("image_url")
    if url and isinstance(held, dict) and isinstance(held.get("url"), str):
        body["image_url"] = {**held, "url": url}
    return body


def test_the_llm_package_asks_it(server):
    model = Chat("mm1", model_name="mm1-tiny", api_base=f"{server.url}/v1", vision=True)
    model.key = "none"
    attachment = llm.Attachment(path=str(STAR))
    asked = {"attachments": [attachment], "temperature": 0, "max_tokens": 8}
    for stream in (True, False):
        response = model.prompt("What colour is the star?", stream=stream, **asked)
        # The package shows the picture behind the question.
        assert response.text() == "red"
