"""Conversations about drawn pictures, as training sees them."""

import json

import numpy as np
import pytest
from PIL import Image

from mm1_mlx.config import PromptConfig
from mm1_mlx.image import load_pictures
from mm1_mlx.tokenizer import load_tokenizer
from mm1_mlx.train.sample import build_sample, collate
from mm1_mlx.writer import CheckpointWriter

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


@pytest.fixture(scope="session")
def write_folder(byte_folder):
    """A function: a model's folder, with the byte-level tokenizer."""

    def write_folder(out, model, **options):
        with CheckpointWriter(
            out, model.config, {"name": "a test's"}, **options
        ) as writer:
            for name, tensor in model.tensors().items():
                writer.add(name, tensor)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                writer.add_file(name, byte_folder / name)
        return out

    return write_folder


@pytest.fixture(scope="session")
def write_rows():
    """A function: a file of conversations about one picture each, of these answers."""

    def write_rows(folder, answers):
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for i, answer in enumerate(answers):
            Image.new("RGB", (16, 16), COLOURS[i % 4]).save(folder / f"{i}.png")
            turns = [("human", "<image>\nWhat colour is it?"), ("gpt", answer)]
            talk = [{"from": role, "value": text} for role, text in turns]
            lines.append(json.dumps({"image": f"{i}.png", "conversations": talk}))
        path = folder / "rows.jsonl"
        path.write_text("".join(f"{line}\n" for line in lines))
        return path

    return write_rows
