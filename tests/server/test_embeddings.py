"""Vectors of texts and pictures, by OpenAI's own client."""

import base64
import io
import threading
import time

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from serving import FOUR, STAR, picture, serving

from mm1_mlx.apps.server.keeper import open_model
from mm1_mlx.apps.server.policy import Policy
from mm1_mlx.apps.server.turns import Turns
from mm1_mlx.embed import BATCH, embed_images, embed_texts, load_embedder
from mm1_mlx.errors import ConfigError

TEXTS = ["a red star", "four shapes", "a red star"]


@pytest.fixture(scope="module")
def clip(clip_folder):
    with serving(source=clip_folder) as running:
        yield running


@pytest.fixture(scope="module")
def client(clip):
    with openai.OpenAI(base_url=f"{clip.url}/v1", api_key="none") as client:
        yield client


@pytest.fixture(scope="module")
def embedder(clip_folder):
    return load_embedder(clip_folder)


# The client asks for base64 where nothing is said, and decodes it.
@pytest.mark.parametrize("form", [None, "float", "base64"])
def test_texts_are_embedded(client, embedder, form):
    fields = {"encoding_format": form} if form else {}
    reply = client.embeddings.create(model="mm1-tiny", input=TEXTS, **fields)
    vectors = [item.embedding for item in reply.data]
    if form == "base64":
        vectors = [np.frombuffer(base64.b64decode(v), "<f4") for v in vectors]
    expected = embed_texts(embedder, TEXTS)
    np.testing.assert_array_equal(np.array(vectors, np.float32), expected)
    assert [item.index for item in reply.data] == [0, 1, 2]
    assert reply.usage.prompt_tokens == reply.usage.total_tokens > 0
    one = client.embeddings.create(model="mm1-tiny", input=TEXTS[1], **fields)
    vector = one.data[0].embedding
    if form == "base64":
        vector = np.frombuffer(base64.b64decode(vector), "<f4")
    vector = np.array(vector, np.float32)
    np.testing.assert_array_equal(vector, embed_texts(embedder, TEXTS[1:2])[0])
    # Matrix products of other heights may round otherwise: with AVX2 OpenBLAS's do.
    np.testing.assert_allclose(vector, expected[1], rtol=0, atol=1e-6)


def test_pictures_and_texts_stand_in_their_order(clip, embedder):
    given = ["a star", picture(STAR), "shapes", picture(FOUR)]
    reply = clip.client.post("/v1/embeddings", json={"input": given}).json()
    vectors = np.array([item["embedding"] for item in reply["data"]], np.float32)
    np.testing.assert_array_equal(vectors[::2], embed_texts(embedder, given[::2]))
    np.testing.assert_array_equal(vectors[1::2], embed_images(embedder, [STAR, FOUR]))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)


def test_a_model_without_a_decoder_does_not_answer(clip):
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("/v1/completions", {"prompt": "Hi"}),
    ):
        refused = clip.client.post(path, json=body)
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "model_cannot_answer"
    (model,) = clip.client.get("/v1/models").json()["data"]
    assert (model["mm1"]["answers"], model["mm1"]["embeds"]) == (False, True)


# Where the header is read, and where the pixels are.
@pytest.mark.parametrize(
    ("length", "said"), [(22 + 20, "not a PNG"), (22 + 200, "is damaged")]
)
def test_a_damaged_picture_is_refused_by_its_place(clip, length, said):
    part = picture(STAR)
    part["image_url"]["url"] = part["image_url"]["url"][:length]
    # More than are embedded at once.
    given = ["a", *[picture(STAR)] * BATCH, part]
    refused = clip.client.post("/v1/embeddings", json={"input": given})
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["param"] == f"input[{BATCH + 1}].image_url.url"
    assert error["message"].startswith(f"picture {BATCH + 1} ")
    assert said in error["message"]


def test_a_text_of_any_length_is_embedded_by_its_beginning(clip):
    reply = clip.client.post("/v1/embeddings", json={"input": "a star " * 2000})
    assert reply.json()["usage"]["prompt_tokens"] == 40


def large(side=8_000):
    """A picture of many pixels and few bytes, as a part."""
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{data}"},
    }


def test_pictures_of_too_many_pixels_together_are_refused(clip):
    refused = clip.client.post("/v1/embeddings", json={"input": [large()] * 3})
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert "192,000,000 pixels together" in error["message"]
    assert error["param"] == "input"


@pytest.fixture
def held(monkeypatch):
    """What lets the model's thread go on, and the texts that it has begun with."""
    going, embedded = threading.Event(), []

    def embed(embedder, texts):
        embedded.append(texts)
        going.wait(20)
        return embed_texts(embedder, texts)

    monkeypatch.setattr("mm1_mlx.apps.server.embeddings.embed_texts", embed)
    yield going, embedded
    going.set()


def leave(clip, texts):
    """Ask for vectors, and do not wait for them."""
    with pytest.raises(httpx.ReadTimeout):
        clip.client.post("/v1/embeddings", json={"input": texts}, timeout=0.5)


def test_who_leaves_has_no_more_embedded_and_ends_nothing_else(clip, held):
    going, embedded = held
    leave(clip, ["a"] * 40)
    leave(clip, ["b"])
    going.set()
    reply = clip.client.post("/v1/embeddings", json={"input": "c"})
    assert reply.status_code == 200
    assert [texts[0] for texts in embedded] == ["a", "c"]
    assert clip.client.get("/health").json()["status"] == "ok"


def test_a_full_queue_is_told(clip, held, monkeypatch):
    going, _ = held
    monkeypatch.setattr(clip.service, "turns", Turns(1))
    thread = threading.Thread(
        target=clip.client.post,
        args=("/v1/embeddings",),
        kwargs={"json": {"input": "a"}},
    )
    thread.start()
    while clip.service.turns._taken == 0:
        time.sleep(0.01)
    refused = clip.client.post("/v1/embeddings", json={"input": "b"})
    going.set()
    thread.join()
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert clip.client.post("/v1/embeddings", json={"input": "b"}).status_code == 200


def test_half_a_pair_of_surrogates_is_no_text(clip):
    for body in (
        '{"input": "\\ud800"}',
        '{"input": ["a", "x\\udfff"]}',
        '{"\\ud800": 1}',
    ):
        refused = clip.client.post(
            "/v1/embeddings",
            content=body.encode(),
            headers={"content-type": "application/json"},
        )
        assert refused.status_code == 400, body
        assert "surrogate pair" in refused.json()["error"]["message"]
    reply = clip.client.post(
        "/v1/embeddings",
        content=b'{"input": "\\ud83d\\ude00"}',
        headers={"content-type": "application/json"},
    )
    assert reply.status_code == 200


def test_options_that_embeddings_know_nothing_of_are_refused(clip_folder):
    for options in ({"resolution": "96"}, {"adapters": [("a", 1.0)]}):
        with pytest.raises(ConfigError, match="embeddings know no --"):
            open_model(Policy(), source=clip_folder, **options)
