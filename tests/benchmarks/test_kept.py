"""What a run of the embedded model's recipe leaves behind."""

from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from tokenizers import Tokenizer

from benchmarks.shapes.joint import Pupil
from benchmarks.shapes.recipe import RECIPE
from benchmarks.shapes.train import keep, restore


def test_kept_weights_are_those_of_their_step(recipe, tmp_path):
    mx.random.seed(3)
    pupil = Pupil(recipe)
    short = replace(recipe.stages[-1].train, steps=7, warmup_steps=0, decay_steps=0)
    stage = replace(recipe.stages[-1], train=short)
    arguments = Namespace(folder=tmp_path, keep=5)
    for step in (1, 5, 6, 7):
        keep(SimpleNamespace(step=step), pupil, stage, arguments)
    names = sorted(path.name for path in (tmp_path / "kept").iterdir())
    # Every fifth, and the last.
    assert names == [f"{stage.name}-{step:06}.safetensors" for step in (5, 7)]
    other = Pupil(recipe)
    restore(other, tmp_path / "kept" / names[0])
    expected = dict(tree_flatten(pupil.parameters()))
    for name, weight in tree_flatten(other.parameters()):
        assert weight.dtype == mx.float32
        np.testing.assert_allclose(weight, expected[name], rtol=1e-3, atol=1e-6)


def test_the_committed_checkpoint_is_of_the_recipe(recipe):
    folder = RECIPE.parent / "checkpoint"
    pupil = Pupil(recipe)
    before = pupil.mm1.decoder.embed_tokens.weight
    restore(pupil, folder / "weights.safetensors")
    assert not mx.array_equal(pupil.mm1.decoder.embed_tokens.weight, before)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert backend.get_vocab_size() <= recipe.config.decoder.vocab_size
