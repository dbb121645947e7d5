"""The recipe of the embedded model, small, and its tokenizer."""

from dataclasses import replace

import pytest

from benchmarks.shapes.conversations import Conversations
from benchmarks.shapes.recipe import load_recipe, open_tokenizer


@pytest.fixture(scope="session")
def recipe():
    """The committed recipe, with few pictures in a batch."""
    recipe = load_recipe()
    stages = [replace(stage, pictures=16, episodes=6) for stage in recipe.stages]
    return replace(recipe, stages=tuple(stages))


@pytest.fixture(scope="session")
def tokenizer(recipe, tmp_path_factory):
    return open_tokenizer(tmp_path_factory.mktemp("tokenizer"), recipe.config)


@pytest.fixture(scope="session")
def conversations(recipe, tokenizer):
    """A function: a batch of the form that is named, in the last stage."""
    stage = recipe.stages[-1]

    def conversations(form, step=0):
        made = replace(stage, forms=((form,),), weights={}, only_seen=())
        return Conversations(recipe, made, tokenizer)(step, 0)

    return conversations
