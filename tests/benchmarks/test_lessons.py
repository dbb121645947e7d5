"""The lessons: every point can be trained, and figures become verdicts by a rule."""

import errno
import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from benchmarks.lessons import learn, measure, report, run
from benchmarks.lessons.batches import Documents, Questions, form_of
from benchmarks.lessons.cases import Case, cases_of
from benchmarks.lessons.documents import LISTED, NAMES, asked, lesson_scene, listed
from benchmarks.lessons.learn import DOCUMENTS, QUESTIONS, stream, train
from benchmarks.lessons.models import (
    config_of,
    encoder_digest,
    encoder_weights,
    working_weights,
)
from benchmarks.lessons.points import (
    BASE,
    LESSONS,
    ONCE,
    SEEDS,
    SPARSE,
    THIRDS,
    Claim,
    measures_of,
    points_of,
)
from benchmarks.lessons.verdict import Estimate, estimate, gains, judge
from benchmarks.shapes.scene import HELD_OUT, SEEN_PAIRS, split_rng
from mm1_mlx import files
from mm1_mlx.models import MM1
from mm1_mlx.prompt import Prompt
from mm1_mlx.train.sample import build_document, build_sample

ROOT = Path(__file__).parents[2]
POINTS = points_of()
CLAIMS = [claim for lesson in LESSONS for claim in lesson.claims]


@pytest.mark.parametrize("point", POINTS.values(), ids=POINTS)
def test_every_point_is_a_model_that_sees(point):
    config = config_of(point)
    model = MM1(config)
    pixels = mx.zeros((2, point.image_size, point.image_size, 3))
    images = model.connector(model.vision(pixels))
    assert images.shape == (2, point.image_tokens, config.decoder.hidden_size)


def test_names_tell_points_apart():
    listed_points = [point for lesson in LESSONS for point, _ in lesson.points]
    assert all(POINTS[point.name] == point for point in listed_points)
    settings = [replace(point, name="") for point in POINTS.values()]
    assert len(set(settings)) == len(settings)


def test_what_a_claim_compares_is_measured_and_differs_in_one_thing():
    for claim in CLAIMS:
        names = (claim.better, claim.worse, *claim.rivals)
        assert all(claim.measure in measures_of(POINTS[name]) for name in names)
        # Only who was asked in training can be.
        asked = [bool(POINTS[name].question_steps) for name in names]
        assert asked == [claim.measure == "answers"] * len(names)
        better, worse = (vars(POINTS[n]) for n in (claim.better, claim.worse))
        differing = [n for n in better if n != "name" and better[n] != worse[n]]
        assert len(differing) == 1, claim.text


def test_experts_have_as_many_weights_at_work_but_for_the_gates():
    dense, sparse = (working_weights(MM1(config_of(p))) for p in (BASE, SPARSE))
    config = config_of(SPARSE).decoder
    gates = config.moe.num_experts * config.hidden_size
    sparse_layers = sum(config.is_sparse(i) for i in range(config.num_hidden_layers))
    assert sparse - dense == gates * sparse_layers


def test_forms_come_in_the_shares_of_the_mix():
    for mix in {point.mix for point in POINTS.values()}:
        counts = Counter(form_of(step, mix) for step in range(100))
        for form, share in zip(("captions", "interleaved", "texts"), mix, strict=True):
            assert counts[form] == pytest.approx(100 * share / sum(mix), abs=1)


def test_no_two_stages_see_the_same_pictures():
    stages = (DOCUMENTS, QUESTIONS)
    streams = [stream(seed, stage) for seed in SEEDS for stage in stages]
    assert len(set(streams)) == len(streams)


def test_batches_are_made_again_alike(tokenizer):
    config = config_of(BASE)
    for make in (
        Documents(config, tokenizer, 1, BASE.mix),
        Questions(config, tokenizer, 2),
    ):
        for step in range(3):
            first, again = make(step, 0), make(step, 0)
            np.testing.assert_array_equal(first.tokens, again.tokens)
            assert first.learned.sum() == again.learned.sum() > 0
            used = {span.picture for span in first.spans}
            assert used == set(range(len(first.pictures)))


def test_a_conversation_asks_one_question_of_each_kind_behind_one_picture(tokenizer):
    rng = split_rng("train", 4)
    kinds = [q.kind for q in asked(lesson_scene(rng), rng)]
    assert len(kinds) == len(set(kinds)) > 2
    batch = Questions(config_of(BASE), tokenizer, 2)(0, 0)
    assert len(batch.spans) == len(batch.pictures) == len(batch.tokens)


@pytest.mark.parametrize("name", NAMES)
def test_a_list_names_everything_in_one_way(name):
    pairs = SEEN_PAIRS[:LISTED]
    in_words = listed(pairs, name)
    shown = listed(pairs, name, range(LISTED))
    assert [part for part in shown if isinstance(part, int)] == list(range(LISTED))
    names = [part for part in shown if isinstance(part, str)]
    # As in words: so what is learned of one is learned of the other.
    assert names == [f" {name(pair)}\n" for pair in pairs]
    assert [line.split(":")[1] for line in in_words] == names


@pytest.mark.parametrize("measure", ["answers", "zero-shot", "few-shot", "text"])
def test_cases_have_one_right_text_in_any_place(measure):
    cases = list(cases_of(measure, 40))
    assert cases == list(cases_of(measure, 40)) != list(cases_of(measure, 40, seed=1))
    for case in cases:
        assert len(set(case.texts)) == len(case.texts) > 1
        assert 0 <= case.right < len(case.texts)
    assert len({case.right for case in cases}) > 1
    if measure in ("zero-shot", "few-shot"):
        told = " ".join(text for case in cases for text in case.texts)
        assert not any(f"{c} {s}" in told for c, s in HELD_OUT)
    if measure == "few-shot":
        before = [part for part in cases[0].parts if isinstance(part, str)]
        assert len(before) == LISTED - 1


@pytest.mark.parametrize("name", ["answers", "zero-shot", "few-shot", "text"])
def test_cases_are_the_tokens_that_training_reads(name, tokenizer):
    config = config_of(BASE)
    if name != "answers":
        config = replace(config, prompt=replace(config.prompt, template="plain"))
    image = config.prompt.image_token_id
    for case in islice(cases_of(name, 40), 60):
        asked, text = measure._candidates(case).ask, case.texts[case.right]
        prompt, (behind,) = Prompt.build_continued(
            asked.prompt, asked.images, config, tokenizer, [text]
        )
        # In a sample a picture is one token.
        tokens = []
        for token in prompt.tokens:
            if token != image or tokens[-1:] != [image]:
                tokens.append(token)
        held = [part if isinstance(part, str) else None for part in case.parts]
        if name == "answers":
            turns = [("user", held), ("assistant", [text.strip()])]
            sample = build_sample(turns, config, tokenizer)
        else:
            joined = [*held[:-1], held[-1] + text] if held[-1] else [*held, text]
            sample = build_document(joined, config, tokenizer)
        assert sample.tokens[: len(tokens) + len(behind)] == (*tokens, *behind)


def test_interval_is_students():
    # Of 3 values the quantile is 4.303 (tables of t, 2 degrees of freedom, 97.5 %).
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == pytest.approx(2.0)
    half = 4.302653 / math.sqrt(3)
    assert (found.low, found.high) == pytest.approx((2.0 - half, 2.0 + half), rel=1e-6)
    alone = estimate([0.5])
    assert (alone.low, alone.high) == (-math.inf, math.inf)


def test_a_gain_is_taken_seed_by_seed_and_less_what_rivals_differ():
    shares = {
        ("answers", "a"): {0: 0.9, 1: 0.8, 2: 0.7},
        ("answers", "b"): {0: 0.5, 1: 0.5},
        ("answers", "c"): {0: 0.6, 1: 0.7, 2: 0.1},
    }
    claim = Claim("", "", "answers", "a", "b")
    assert gains(claim, shares) == pytest.approx([0.4, 0.3])
    claim = replace(claim, rivals=("b", "c"))
    # With each seed c is better than b by what the other says.
    assert gains(claim, shares) == pytest.approx([0.3, 0.1])
    shares["answers", "b"][0] = 0.9
    # Now b is with the first seed, which the second does not know.
    assert gains(claim, shares) == pytest.approx([0.0 + 0.3, 0.3 + 0.2])
    assert gains(replace(claim, measure="text"), shares) == []


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.01, 0.2, "shows"),
        (-0.01, 0.2, "does not show"),
        (-0.2, 0.01, "does not show"),
        (-0.2, -0.01, "opposite"),
        (-math.inf, math.inf, "does not show"),
    ],
)
def test_a_lesson_shows_where_the_interval_says_so(low, high, verdict):
    assert judge(Estimate((low + high) / 2, low, high)) == verdict


def test_rivals_that_are_alike_lie_apart_by_nothing_on_average():
    rng = np.random.default_rng(0)
    claim = Claim("", "", "answers", "a", "b", rivals=("c", "d", "e"))
    found = []
    for _ in range(2000):
        shares = {
            ("answers", name): dict(enumerate(rng.normal(0.5, 0.01, 3)))
            for name in "abcde"
        }
        found += gains(claim, shares)
    assert np.mean(found) == pytest.approx(0, abs=0.001)


# Pictures of a measure.
NUMBER = 3


@pytest.fixture(scope="module")
def short(tokenizer, tmp_path_factory):
    """A folder with two steps of each stage of two points, one of each kind."""
    folder = tmp_path_factory.mktemp("lessons")
    tokenizer.hf.save_pretrained(folder / "tokenizer")
    points = (
        replace(ONCE, experts=4, pretrain_steps=2, question_steps=2),
        replace(THIRDS, pretrain_steps=2),
    )
    for point in points:
        run.run_point(folder, point, 0, NUMBER, "abc")
    return folder, points


def test_a_run_leaves_figures_and_nothing_else(short):
    folder, points = short
    for point in points:
        assert run.is_done(folder, point, 0, NUMBER)
        assert not run.is_done(folder, point, 1, NUMBER)
        values = json.loads(run.figures_path(folder, point, 0).read_text())
        assert set(values["figures"]) == set(measures_of(point))
        spent = values["seconds"]
        assert set(spent) == {"rest", "measure", *values["losses"]}
        assert all(seconds > 0 for seconds in spent.values())
        assert values["machine"]["commit"] == "abc"
        for row in values["figures"].values():
            assert 0 <= row["right"] <= 1
            assert row["n"] == sum(asked for _, asked in row["kinds"].values())
        assert all(math.isfinite(loss) for loss in values["losses"].values())
    assert not list((folder / "unfinished").iterdir())


def test_a_stage_that_is_done_is_not_trained_again(short, tokenizer, tmp_path):
    _, (_, point) = short
    runs = [train(point, 0, tokenizer, tmp_path) for _ in range(2)]
    assert runs[0][1] == runs[1][1]
    weights = [dict(tree_flatten(model.parameters())) for model, _ in runs]
    assert all(mx.array_equal(x, weights[1][name]) for name, x in weights[0].items())
    # And the encoder stays as it is.
    kept = encoder_weights(config_of(point).vision)
    assert all(mx.array_equal(x, weights[0][f"vision.{k}"]) for k, x in kept.items())


def test_what_stands_is_not_run_again(short, capsys):
    folder, points = short
    before = run.figures_path(folder, points[0], 0).stat().st_mtime_ns
    assert run.run_all(folder, points, [0], 1, number=NUMBER) == 0
    assert capsys.readouterr().out == ""
    assert run.figures_path(folder, points[0], 0).stat().st_mtime_ns == before


def test_figures_of_other_settings_are_refused(short, monkeypatch):
    folder, (point, _) = short
    other = "is of other settings; remove it"
    with pytest.raises(FileExistsError, match=other):
        run.is_done(folder, ONCE, 0, NUMBER)
    with pytest.raises(FileExistsError, match=other):
        run.is_done(folder, point, 0, NUMBER + 1)
    # Nor does what was begun go on as something else.
    begun = folder / "unfinished" / f"{point.name}-seed1"
    begun.mkdir()
    (begun / "made.json").write_text(json.dumps(run.made_of(SPARSE, 1, NUMBER)))
    with pytest.raises(FileExistsError, match=rf"made.json {other}"):
        run.run_point(folder, point, 1, NUMBER)
    shutil.rmtree(begun)
    # The report has the one rule.
    with pytest.raises(FileExistsError, match=other):
        report.read_runs(folder)
    monkeypatch.setattr(learn, "WARMUP", 0.5)
    with pytest.raises(FileExistsError, match=other):
        run.is_done(folder, point, 0, NUMBER)


def test_figures_that_were_cut_off_are_not_there(short, monkeypatch, tmp_path):
    """A disk that is full leaves the file that stood, or none."""
    folder, (point, _) = short
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    path = run.figures_path(tmp_path, point, 0)
    before = path.read_text()

    def full(place):
        if place.parent == path.parent:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(place)

    fsync = files.fsync
    monkeypatch.setattr(files, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        run.run_point(tmp_path, point, 0, NUMBER)
    assert path.read_text() == before
    assert sorted(p.name for p in path.parent.iterdir()) == sorted(
        p.name for p in (folder / "figures").iterdir()
    )


def test_a_process_finds_its_blas_before_mlx():
    """What spawned processes import before they are told to: without it steps take ten times."""
    code = "import sys, benchmarks.lessons.run; sys.exit('mlx.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_run_that_fails_leaves_the_others_going(tmp_path, capsys, monkeypatch):
    def work(name, fails):
        if fails:
            raise ValueError(f"no {name}")
        return f"{name}: 50%"

    with ThreadPoolExecutor(1) as pool:
        jobs = {pool.submit(work, name, name == "b"): name for name in "abc"}
        assert run._report(jobs) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        f"{i} of 3" for i in (1, 2, 3)
    ]
    assert sorted(line.partition(": ")[2] for line in lines) == [
        "a: 50%",
        "b failed: ValueError('no b')",
        "c: 50%",
    ]
    monkeypatch.setattr("sys.argv", ["run", str(tmp_path)])
    monkeypatch.setattr("mm1_mlx.bench.machine.commit", lambda: "abc-dirty")
    with pytest.raises(SystemExit, match="use a clone"):
        run.main()
    monkeypatch.setattr("mm1_mlx.bench.machine.commit", lambda: "abc")
    monkeypatch.setattr(run, "run_all", lambda *_, made_by: int(made_by == "abc"))
    with pytest.raises(SystemExit, match="1 failed"):
        run.main()


def test_the_likeliest_text_is_what_is_said(monkeypatch):
    cases = [
        Case("colour", ("?",), ("red", "blue"), 0),
        Case("colour", ("?",), ("red", "blue"), 1),
        Case("shape", ("?",), ("star", "heart", "cross", "circle"), 2),
    ]
    told = [[-3.0, -1.0], [-9.0, -8.0], [-5.0, -4.0, -0.5, -6.0]]

    def likelihoods(_, asked):
        assert [each.texts for each in asked] == [case.texts for case in cases]
        for number in (2, 0, 1):
            yield number, [SimpleNamespace(logprob=x) for x in told[number]]

    monkeypatch.setattr(measure, "loglikelihoods", likelihoods)
    found = measure.figures(None, cases)
    assert found["right"] == pytest.approx(2 / 3)
    assert found["chance"] == pytest.approx((0.5 + 0.5 + 0.25) / 3)
    assert found["kinds"] == {"colour": [1, 2], "shape": [1, 1]}


def made_up(seeds=SEEDS):
    """Figures of every run, in which whatever is later in its lesson is better."""
    runs = []
    for place, point in enumerate(POINTS.values()):
        for seed in seeds:
            row = {"right": 0.3 + 0.02 * place + 0.001 * seed**2, "chance": 0.25}
            runs.append(
                {
                    "point": run.as_json(point),
                    "seed": seed,
                    "encoder": "abc",
                    "figures": dict.fromkeys(measures_of(point), row),
                    "working_weights": 1,
                    "losses": {"questions": 1.0},
                    "seconds": {"documents": 20.0, "questions": 70.0, "measure": 10.0},
                    "machine": {"cpu_cores": 2, "commit": "abc"},
                }
            )
    return runs


def test_a_report_has_every_lesson(tmp_path):
    runs, count = made_up(), len(POINTS) * len(SEEDS)
    runs[1]["seconds"] = {"documents": 1.0, "questions": 290.0, "measure": 10.0}
    results = report.summarise(runs)
    assert results["runs"] == count
    assert results["machines"] == [{"cpu_cores": 2, "commit": "abc"}]
    assert len(results["each"]) == count
    assert results["seconds"] == {
        "mean": round(100 + 201 / count, 1),
        "longest": 301.0,
        "over": 1,
    }
    first = results["claims"][0]
    assert (first["verdict"], first["runs"], first["mean"]) == ("shows", 3, 0.04)
    text = report.table(results)
    assert "(lessons.png)" in text
    assert all(claim.text in text for claim in CLAIMS)
    report.plot(results, tmp_path / "lessons.png")
    assert (tmp_path / "lessons.png").stat().st_size > 10_000


@pytest.mark.parametrize("places", [[3], range(len(POINTS) * len(SEEDS))])
def test_a_report_of_several_commits_or_none_is_refused(places, monkeypatch, tmp_path):
    runs = made_up()
    for place in places:
        runs[place]["machine"] = {"cpu_cores": 2, "commit": None}
    monkeypatch.setattr(report, "read_runs", lambda _: runs)
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path)])
    with pytest.raises(SystemExit, match="several commits, or of none"):
        report.main()


def test_a_report_of_half_the_runs_says_what_is_missing():
    part = [x for x in made_up((0,)) if x["point"]["name"] in ("base", "48px", "96px")]
    results = report.summarise(part)
    verdicts = {row["text"]: row["verdict"] for row in results["claims"]}
    assert verdicts["a higher resolution is better"] == "does not show"
    assert verdicts["experts beat a dense decoder"] == "not run"
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert "one run" in report.table(results)


def test_readme_has_the_table_of_the_results():
    text = report.README.read_text()
    held = text.split(report.BEGIN)[1].split(report.END)[0]
    results = json.loads(report.RESULTS.read_text())
    assert held == report.table(results)
    assert results["runs"] == len(POINTS) * len(SEEDS)
    assert results["seconds"]["over"] == 0
    # Of the encoder that is shipped.
    assert {row["encoder"] for row in results["each"]} == {encoder_digest()}
