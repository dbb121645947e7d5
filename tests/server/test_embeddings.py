"""Vectors of texts and pictures, by OpenAI's own client."""

import base64

import numpy as np
import openai
import pytest
from serving import FOUR, STAR, picture, serving

from mm1_mlx.embed import embed_images, embed_texts, load_embedder

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
    assert one.data[0].embedding == reply.data[1].embedding


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


def test_a_damaged_picture_is_refused(clip):
    part = picture(STAR)
    part["image_url"]["url"] = part["image_url"]["url"][:200]
    refused = clip.client.post("/v1/embeddings", json={"input": ["a", part]})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "input"


def test_a_text_of_any_length_is_embedded_by_its_beginning(clip):
    reply = clip.client.post("/v1/embeddings", json={"input": "a star " * 2000})
    assert reply.json()["usage"]["prompt_tokens"] == 40
