"""What the server says of itself is what it does: OpenAPI, manual, and other clients."""

import json
from pathlib import Path

import llm
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from llm.default_plugins.openai_models import Chat
from serving import STAR

from mm1_mlx.apps.server.openapi import ROUTES, describe
from mm1_mlx.apps.server.reference import reference

ROOT = Path(__file__).parents[2]
# Of every path that takes a body.
CASES = 90


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


@pytest.mark.slow
def test_made_up_requests_are_no_fault_of_ours(server, described):
    schema = schemathesis.openapi.from_dict(described)
    schema.config.update(base_url=server.url)
    seen = {}
    for operation in schema.get_all_operations():
        made = operation.ok()
        takes = made.method.upper() == "POST"
        for mode in (
            schemathesis.GenerationMode.POSITIVE,
            schemathesis.GenerationMode.NEGATIVE,
        ):
            if not takes and mode is schemathesis.GenerationMode.NEGATIVE:
                continue
            strategy = made.as_strategy(generation_mode=mode)
            statuses = _run(strategy, CASES if takes else 10)
            seen[made.path, mode.value] = statuses
    total = sum(sum(statuses.values()) for statuses in seen.values())
    assert total >= 500
    for statuses in seen.values():
        assert not [status for status in statuses if status >= 500]
    # What is right is answered, and what is wrong is not.
    assert seen["/v1/chat/completions", "positive"].get(200, 0) > 5
    assert seen["/v1/chat/completions", "negative"].get(400, 0) > CASES / 2


def _run(strategy, cases):
    statuses = {}

    @settings(
        max_examples=cases, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=strategy)
    def check(case):
        # A long answer proves nothing more.
        if isinstance(case.body, dict) and "max_tokens" not in case.body:
            case.body = {**case.body, "max_tokens": 2}
        response = case.call(session=None, timeout=60)
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        case.validate_response(
            response, checks=[schemathesis.checks.not_a_server_error]
        )

    check()
    return statuses


def test_the_llm_package_asks_it(server):
    model = Chat("mm1", model_name="mm1-tiny", api_base=f"{server.url}/v1", vision=True)
    model.key = "none"
    attachment = llm.Attachment(path=str(STAR))
    asked = {"attachments": [attachment], "temperature": 0, "max_tokens": 8}
    for stream in (True, False):
        response = model.prompt("What colour is the star?", stream=stream, **asked)
        # The package shows the picture behind the question.
        assert response.text() == "A red star."
