"""The model class for lmms-eval, on the package where it is installed, else on its API.

lmms-eval needs torchvision and fifty packages more, so that a stand-in of the two classes
of it that are used here takes its place where it is not installed: as
``lmms_eval/api/model.py`` and ``registry_v2.py`` have them at 75571cf.
"""

import importlib
import sys
import tomllib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image

from mm1_mlx.batch import Ask
from mm1_mlx.errors import ConfigError, PromptError
from mm1_mlx.likelihood import Candidates, loglikelihoods
from mm1_mlx.runtime import TINY, generate, load

STAR, FOUR = Image.open(TINY / "red-star.png"), Image.open(TINY / "four-shapes.png")
DOCUMENTS = [
    {"images": [STAR], "question": "What colour is the star?"},
    {"images": [FOUR], "question": "How many shapes are there?"},
    {"images": [FOUR, STAR], "question": "<image><image>Is there a red star?"},
    {"images": [], "question": "Is there a star?"},
]


@dataclass(frozen=True)
class StandInManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


class StandIn:
    is_simple = True

    def __init__(self):
        self.task_dict = {}
        self.cache_hook = SimpleNamespace(add_partial=lambda *_: None)

    def clean(self):
        """Frees torch's memory there."""


@pytest.fixture(scope="module")
def adapter():
    """The module under test."""
    names = ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "lmms_eval.models",
             "lmms_eval.models.registry_v2")  # fmt: skip
    installed = find_spec("lmms_eval") is not None
    if not installed:
        modules = {name: ModuleType(name) for name in names}
        modules["lmms_eval.api.model"].lmms = StandIn
        modules["lmms_eval.models.registry_v2"].ModelManifest = StandInManifest
        sys.modules.update(modules)
    yield importlib.import_module("mm1_mlx.eval.lmms")
    sys.modules.pop("mm1_mlx.eval.lmms")
    for name in () if installed else names:
        sys.modules.pop(name)


@pytest.fixture(scope="module")
def model(adapter):
    made = adapter.MM1Lmms(batch_size=2, device="cuda:0")
    made.task_dict = {"shapes": {"test": DOCUMENTS}}
    yield made
    made.clean()


@pytest.fixture(scope="module")
def runtime():
    with load() as runtime:
        yield runtime


def request(number, *arguments, visual=lambda document: document["images"]):
    first, *rest = arguments
    return SimpleNamespace(
        args=(first, *rest[:1], visual, *rest[1:], number, "shapes", "test")
    )


def test_answers_are_those_of_the_package(model, runtime):
    options = {"max_new_tokens": 8, "temperature": 0, "until": ["\n"]}
    requests = [
        request(i, d["question"], dict(options)) for i, d in enumerate(DOCUMENTS)
    ]
    expected = [
        generate(runtime, d["question"].replace("<image>", ""), d["images"],
                 max_tokens=8).text.strip()
        for d in DOCUMENTS
    ]  # fmt: skip
    assert model.generate_until(requests) == expected
    assert len(set(expected)) > 1


def test_losses_are_the_packages_likelihoods_and_least_is_best(model, runtime):
    document = DOCUMENTS[0]
    texts = (" red", " blue")
    requests = [request(0, document["question"], text) for text in texts]
    requests.append(request(0, document["question"], lambda _: " red"))
    ask = Ask(document["question"], document["images"])
    ((_, expected),) = loglikelihoods(runtime, [Candidates(ask, texts)])
    found = model.loglikelihood(requests)
    assert [greedy for _, greedy in found[:2]] == [x.greedy for x in expected]
    # Together the two are rows of one batch.
    assert [score for score, _ in found[:2]] == pytest.approx(
        [-x.logprob for x in expected], rel=1e-4, abs=1e-4
    )
    assert min(found)[0] == found[0][0] > 0
    assert found[2] == found[0]


def test_rounds_go_on_until_the_task_ends_them(model, runtime):
    questions = ["What colour is the star?", "What shape is it?"]
    seen = []

    def follow(document, previous_output, round_idx, previous_round_info):
        seen.append((round_idx, list(previous_output), previous_round_info))
        if round_idx == len(questions):
            return None, None, True, previous_output, None
        return document["images"], questions[round_idx], False, previous_output, "info"

    asked = request(0, questions[0], {"max_new_tokens": 8, "until": ["\n"]}, follow)
    (said,) = model.generate_until_multi_round([asked])
    expected = [
        generate(runtime, question, [STAR], max_tokens=8).text.strip()
        for question in questions
    ]
    assert said == expected
    assert seen == [(1, expected[:1], None), (2, expected, "info")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "num_beams is 4"),
        (
            {"repetition_penalty": 1.1},
            r"generation_kwargs has \['repetition_penalty'\]",
        ),
        ({"max_new_tokens": -1}, "max_tokens is -1"),
    ],
)
def test_what_cannot_be_followed_is_refused(model, options, message):
    with pytest.raises(PromptError, match=message):
        model.generate_until([request(0, "What?", options)])


def test_what_is_no_picture_is_refused(model):
    odd = request(0, "What?", {}, visual=lambda _: [{"array": [0.0]}])
    with pytest.raises(PromptError, match="the task shows dict"):
        model.generate_until([odd])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float16", "pretrained": "x"}, r"unknown model_args \['dtype'\]"),
        ({"batch_size": "auto"}, "batch_size is 'auto'"),
    ],
)
def test_arguments_are_read_strictly(adapter, arguments, message):
    with pytest.raises(ConfigError, match=message):
        adapter.MM1Lmms(**arguments)


def test_sampling_is_as_the_task_says(adapter):
    settings = adapter._settings(
        {"temperature": 0.7, "top_p": 0.9, "do_sample": True}, 1
    )
    assert (settings.temperature, settings.top_p, settings.tiled) == (0.7, 0.9, 1)
    assert (
        adapter._settings({"temperature": 0.7, "do_sample": False}, None).temperature
        == 0
    )
    assert adapter._settings({"until": "\n"}, None).stop == ["\n"]
    assert adapter._settings({}, None).max_tokens == 1024


def test_the_registry_finds_it_by_its_entry_point(adapter):
    pyproject = tomllib.loads(
        (Path(__file__).parents[2] / "pyproject.toml").read_text()
    )
    (target,) = pyproject["project"]["entry-points"]["lmms_eval.models"].values()
    module, _, name = target.partition(":")
    assert module == adapter.__name__
    manifest = getattr(adapter, name)()
    assert manifest.model_id == "mm1"
    path, _, name = manifest.simple_class_path.rpartition(".")
    assert getattr(importlib.import_module(path), name) is adapter.MM1Lmms
