"""What a run of the embedded model's recipe leaves behind."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from benchmarks.shapes import curve
from benchmarks.shapes.curve import kept_steps
from benchmarks.shapes.joint import Pupil
from benchmarks.shapes.recipe import open_tokenizer
from benchmarks.shapes.train import (
    end,
    keep,
    keep_start,
    kept_name,
    kept_path,
    make_trainer,
    recall,
    restore,
)
from mm1_mlx.train.state import saved_steps


def test_kept_weights_are_those_of_their_step(recipe, tmp_path):
    mx.random.seed(3)
    pupil = Pupil(recipe)
    short = replace(recipe.stages[-1].train, steps=7, warmup_steps=0, decay_steps=0)
    stage = replace(recipe.stages[-1], train=short)
    wanted = [kept_name(stage, 6)]

    def kept(every):
        folder = tmp_path / str(every)
        folder.mkdir()
        for step in (0, 1, 5, 6, 7):
            keep(SimpleNamespace(step=step), pupil, stage, folder, every, wanted)
        return sorted(path.name for path in (folder / "kept").iterdir())

    assert kept(0) == [f"{stage.name}-000006.safetensors"]
    # Every fifth, the last, and what a mean is to be of.
    names = kept(5)
    assert names == [f"{stage.name}-{step:06}.safetensors" for step in (5, 6, 7)]
    other = Pupil(recipe)
    restore(other, tmp_path / "5/kept" / names[0])
    expected = dict(tree_flatten(pupil.parameters()))
    for name, weight in tree_flatten(other.parameters()):
        assert weight.dtype == mx.float32
        np.testing.assert_allclose(weight, expected[name], rtol=1e-3, atol=1e-6)


def test_only_a_finished_run_is_exported(recipe, tmp_path):
    tokenizer = open_tokenizer(tmp_path, recipe.config)
    last = replace(recipe.stages[-1], averaged=())
    recipe = replace(recipe, stages=(last,))
    pupil = Pupil(recipe)
    with pytest.raises(SystemExit, match=f"{last.name} holds no checkpoint"):
        recall(recipe, pupil, tokenizer, tmp_path)
    mx.random.seed(8)
    trained = Pupil(recipe)
    trainer = make_trainer(last, recipe, trained, tokenizer, tmp_path)
    trainer.step = last.end - 1
    trainer.save()
    with pytest.raises(SystemExit, match=f"of {last.end:,}"):
        recall(recipe, pupil, tokenizer, tmp_path)
    trainer.step = last.end
    trainer.save()
    recall(recipe, pupil, tokenizer, tmp_path)
    expected = trained.mm1.decoder.embed_tokens.weight
    assert mx.array_equal(pupil.mm1.decoder.embed_tokens.weight, expected)


def test_a_run_becomes_the_mean_of_what_was_kept(recipe, tmp_path):
    tokenizer = open_tokenizer(tmp_path, recipe.config)
    last = recipe.stages[-1]
    names = ("before-000007", kept_name(last, 0), kept_name(last, 10))
    last = replace(last, averaged=names)
    recipe = replace(recipe, stages=(last,))
    trained = Pupil(recipe)
    trainer = make_trainer(last, recipe, trained, tokenizer, tmp_path)
    trainer.saved = partial(keep, trainer, trained, last, tmp_path, 5, names)
    norm = trained.mm1.decoder.norm
    for step, weight in ((0, 2.0), (5, 6.0), (10, 4.0), (last.end, 8.0)):
        norm.weight = weight * mx.ones_like(norm.weight)
        trainer.step = step
        keep_start(trainer)
    trainer.save()
    # What an earlier stage left counts, too.
    kept_path(tmp_path, names[1]).with_stem(names[0]).hardlink_to(
        kept_path(tmp_path, kept_name(last, 5))
    )
    pupil = Pupil(recipe)
    recall(recipe, pupil, tokenizer, tmp_path)
    assert mx.array_equal(
        pupil.mm1.decoder.norm.weight, 4.0 * mx.ones_like(norm.weight)
    )
    kept_path(tmp_path, names[2]).unlink()
    with pytest.raises(SystemExit, match=r"000010\.safetensors is missing"):
        recall(recipe, pupil, tokenizer, tmp_path)


def test_a_mean_is_of_steps_that_are_saved(recipe):
    stages = {stage.name: stage for stage in recipe.stages}
    names = [name for stage in recipe.stages for name in stage.averaged]
    assert names
    for name in names:
        stage, step = name.rsplit("-", 1)
        end = stages[stage].end
        assert int(step) <= end
        assert int(step) % stages[stage].train.save_every == 0 or int(step) == end, name


def test_a_stage_ends_before_its_schedule_where_the_recipe_says_so(recipe, tmp_path):
    train = replace(recipe.stages[0].train, steps=9, decay_steps=9, warmup_steps=0)
    stage = replace(recipe.stages[0], pictures=2, train=train, until=2)
    assert stage.end == 2
    assert replace(stage, until=None).end == 9
    trainer = make_trainer(stage, recipe, Pupil(recipe), None, tmp_path)
    trainer.run(lambda _: None, watch=partial(end, trainer, stage))
    assert trainer.step == 2
    assert saved_steps(tmp_path / stage.name) == [2]


def test_a_stage_whose_name_begins_anothers_is_told_from_it(tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    for name in ("sft-000500", "sft-2-000500", "sft-2-001000", "sft-2-x"):
        (kept / f"{name}.safetensors").touch()
    assert [step for step, _ in kept_steps(tmp_path, "sft")] == [500]
    assert [step for step, _ in kept_steps(tmp_path, "sft-2")] == [500, 1000]


def test_the_curve_goes_on_after_a_stop_and_ends_with_what_is_shipped(
    recipe, tmp_path, monkeypatch
):
    first, last = recipe.stages[1], recipe.stages[-1]
    before = sum(stage.end for stage in recipe.stages[1:-1])
    kept = tmp_path / "kept"
    kept.mkdir()
    names = [kept_name(first, 100), kept_name(last, 50), kept_name(last, last.end + 50)]
    for name in names:
        kept_path(tmp_path, name).write_text(name)
    asked = []

    def figures(_recipe, _folder, path, number):
        asked.append(path and path.stem)
        if len(asked) == 2:
            raise KeyboardInterrupt
        right = {"accuracy": len(asked) / 10, "interval_95": [0, 1], "n": number}
        return dict.fromkeys(curve.SHOWN, right | {"chance_majority": 0.1})

    monkeypatch.setattr(curve, "_figures", figures)
    with pytest.raises(KeyboardInterrupt):
        curve.measure(recipe, tmp_path, 5)
    points = curve.measure(recipe, tmp_path, 5)
    # What lies behind a stage's end is none of its steps.
    assert asked == [names[0], names[1], names[1], None]
    assert [(point["name"], point["step"]) for point in points] == [
        (names[0], 100),
        (names[1], before + 50),
        ("shipped", before + last.end),
    ]
    assert [point["colour"]["accuracy"] for point in points] == [0.1, 0.3, 0.4]
    curve.measure(recipe, tmp_path, 6)
    assert len(asked) == 7
    # Other weights of the same name are measured anew.
    kept_path(tmp_path, names[0]).write_text("other")
    curve.measure(recipe, tmp_path, 6)
    assert asked[7:] == [names[0]]
    curve.draw(points, tmp_path / "curve.png")
    assert Image.open(tmp_path / "curve.png").width > 1000
