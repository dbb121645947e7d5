"""Conversations about drawn pictures, as training sees them."""

import numpy as np
import pytest
from PIL import Image

from mm1_mlx.config import PromptConfig
from mm1_mlx.image import load_pictures
from mm1_mlx.tokenizer import load_tokenizer
from mm1_mlx.train.sample import build_sample, collate

COLOURS = ["red", "blue", "lime", "white"]


@pytest.fixture(scope="session")
def train_tokenizer(byte_folder):
    return load_tokenizer(byte_folder, PromptConfig(template="llava", image_token_id=2))


@pytest.fixture(scope="session")
def conversation():
    """A function: turns about as many pictures as asked, with several answers."""

    def conversation(*answers, pictures=1):
        turns = []
        for i, answer in enumerate(answers):
            content = [*([None] * pictures if i == 0 else []), f"What is {i}?"]
            turns += [("user", content), ("assistant", [answer])]
        return turns

    return conversation


@pytest.fixture(scope="session")
def make_batch(tiny_config, train_tokenizer):
    """A function: the batch of conversations whose pictures have these colours."""

    def make_batch(conversations, owners, colours=COLOURS):
        samples = [
            build_sample(turns, tiny_config, train_tokenizer) for turns in conversations
        ]
        images = [Image.new("RGB", (16, 16), colour) for colour in colours]
        pictures = load_pictures(images, tiny_config.image)
        return collate(samples, owners, pictures, tiny_config, train_tokenizer)

    return make_batch


@pytest.fixture(scope="session")
def batches(make_batch, conversation):
    """A function: the batch of (step, shard), which names the colour of a picture."""

    def batches(step, shard):
        owners = np.random.default_rng([step, shard]).integers(0, 4, 6).tolist()
        talks = [conversation(COLOURS[owner]) for owner in owners]
        return make_batch(talks, [[owner] for owner in owners])

    return batches
