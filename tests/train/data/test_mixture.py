"""Mixtures are pure functions of specs, files, seed and position."""

import json
import re

import pytest

from mm1_mlx.errors import ConfigError, DataError
from mm1_mlx.train.data.mixture import (
    SPECS,
    DatasetSpec,
    choose_rows,
    open_mixture,
    read_mixture,
    shipped_mixtures,
)
from mm1_mlx.train.paper import CAPTION, LETTER, SHORT_ANSWER


def texts(mixture, positions):
    return [mixture[i].parts[0] for i in positions]


def named(prefix, count):
    return [{"text": f"{prefix}{i}"} for i in range(count)]


def test_one_data_set_is_met_once_an_epoch(open_data, write_lines):
    mixture = open_data(write_lines(named("a", 20)))
    assert len(mixture) == 20
    first, second = texts(mixture, range(20)), texts(mixture, range(20, 40))
    assert sorted(first) == sorted(second) == sorted(f"a{i}" for i in range(20))
    assert first != second
    assert texts(open_data("rows.jsonl"), [35, 3]) == [second[15], first[3]]
    assert texts(open_data("rows.jsonl", seed=1), range(20)) != first


def test_every_kind_of_file_is_mixed(
    open_data, write_lines, write_shard, write_parquet
):
    write_lines(named("l", 4))
    write_shard([(f"{i}.txt", f"s{i}".encode()) for i in range(4)])
    write_parquet(named("p", 4))
    mixture = open_data("rows.jsonl", "shard.tar", "rows.parquet")
    found = {text[0] for text in texts(mixture, range(12))}
    assert found == {"l", "s", "p"}
    assert mixture.count(1200) == pytest.approx([400] * 3, abs=3)


def test_weights_are_shares_of_the_positions(open_data, write_lines):
    write_lines(named("a", 3), "a.jsonl")
    write_lines(named("b", 500), "b.jsonl")
    mixture = open_data("a.jsonl:3", "b.jsonl:1")
    found = texts(mixture, range(400))
    assert sum(text[0] == "a" for text in found) == pytest.approx(300, abs=4)
    assert mixture.count(400)[0] == sum(text[0] == "a" for text in found)
    # Without weights every row is met as often as any other.
    mixture = open_data("a.jsonl", "b.jsonl")
    assert mixture.count(503 * 2) == pytest.approx([6, 1000], abs=3)


def test_weights_are_given_to_all_or_none(open_data, write_lines):
    write_lines(named("a", 3), "a.jsonl")
    with pytest.raises(DataError, match=r"1 of 2 data sets have no weight, e.g. \['a"):
        open_data("a.jsonl:3", "a.jsonl")


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "x"])
def test_a_weight_that_is_none_is_refused(open_data, write_lines, weight):
    write_lines(named("a", 3), "a.jsonl")
    with pytest.raises((DataError, ConfigError), match=r"above 0|nor is"):
        open_data(f"a.jsonl:{weight}")


def test_a_limit_takes_the_first_rows(open_data, write_lines, tmp_path):
    write_lines(named("a", 30), "a.jsonl")
    spec = {"datasets": [{"path": "a.jsonl", "limit": 7}]}
    (tmp_path / "mix.json").write_text(json.dumps(spec))
    mixture = open_data("mix.json")
    assert sorted(texts(mixture, range(7))) == [f"a{i}" for i in range(7)]


def test_a_mixture_lies_beside_its_data(write_lines, tmp_path):
    write_lines(named("a", 3), "inner/a.jsonl")
    spec = {"about": "x", "datasets": [{"path": "a", "weight": 1, "prompts": ["Say."]}]}
    (tmp_path / "inner/mix.json").write_text(json.dumps(spec))
    mixture = open_mixture([str(tmp_path / "inner/mix.json")])
    assert mixture.datasets[0].spec == DatasetSpec(
        path="a", weight=1.0, prompts=("Say.",)
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"path": "../secret.jsonl"},
        {"path": "../*.jsonl"},
        {"path": "link.jsonl"},
        {"path": "a", "image_folder": ".."},
        {"path": "a", "image_folder": "/etc"},
    ],
)
def test_a_mixture_does_not_reach_out_of_its_folder(fields, write_lines, tmp_path):
    write_lines(named("s", 3), "secret.jsonl")
    write_lines(named("a", 3), "data/a.jsonl")
    (tmp_path / "data/link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    path = tmp_path / "data/mix.json"
    path.write_text(json.dumps({"datasets": [fields]}))
    with pytest.raises(
        DataError, match=r"mix.json: '.*' lies outside '.*data'; give a folder"
    ):
        open_mixture([str(path)])
    assert len(open_mixture([str(path)], outside=True)) == 3


def test_a_mixture_may_name_folders_within_its_own(write_lines, tmp_path):
    write_lines(named("a", 3), "data/a.jsonl")
    (tmp_path / "data/inner").mkdir()
    fields = [{"path": "a", "image_folder": x} for x in (".", "inner", "inner/..")]
    path = tmp_path / "data/mix.json"
    path.write_text(json.dumps({"datasets": fields}))
    assert len(open_mixture([str(path)])) == 9


@pytest.mark.parametrize("name", ["valid", "validation-00000-of-00001", "test"])
def test_a_folder_of_splits_measures_by_those_not_learned(name, write_lines, tmp_path):
    write_lines(named("t", 20), "lm/train.jsonl")
    write_lines(named("v", 3), f"lm/{name}.jsonl")
    mixture = open_mixture([str(tmp_path / "lm")], measured=True)
    assert sorted(texts(mixture, range(3))) == ["v0", "v1", "v2"]
    assert len(mixture) == 3
    assert len(open_mixture([str(tmp_path / "lm")])) == 20
    # A split that is named is meant, and where there is none a folder is as it is.
    path = tmp_path / "mix.json"
    spec = {"datasets": [{"path": "lm", "split": "train"}]}
    path.write_text(json.dumps(spec))
    assert len(open_mixture([str(path)], measured=True)) == 20
    (tmp_path / f"lm/{name}.jsonl").unlink()
    assert len(open_mixture([str(tmp_path / "lm")], measured=True)) == 20


@pytest.mark.parametrize("name", ["a.jsonl", "a", "*.jsonl"])
def test_a_split_of_what_has_none_is_refused(name, write_lines, tmp_path):
    write_lines(named("a", 3), "a.jsonl")
    path = tmp_path / "mix.json"
    path.write_text(json.dumps({"datasets": [{"path": name, "split": "nosuch"}]}))
    with pytest.raises(
        ConfigError, match=r"a.jsonl: the split 'nosuch' is named of it"
    ):
        open_mixture([str(path)])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not valid JSON, expected a mixture of data sets"),
        ("[{}]", r"is a list, .* jq -c '.\[\]' mix.json > mix.jsonl"),
        ("7", "MixtureSpec: expected an object, got 7"),
        ('{"datasets": []}', "MixtureSpec.datasets is empty"),
        (
            '{"datasets": [{"paths": "a"}]}',
            r"DatasetSpec: unknown field\(s\) \['paths'",
        ),
        (
            '{"datasets": [{"path": "a", "weight": 0}]}',
            "weight: 0.0 is not a number above 0",
        ),
        ('{"datasets": [{"path": "a", "form": "x"}]}', "form: 'x' is not one of"),
        ('{"datasets": [{"path": "a", "limit": 0}]}', "limit: 0 is not above 0"),
        ('{"datasets": [{"path": ""}]}', "DatasetSpec.path is empty"),
    ],
)
def test_a_mixture_that_is_none_is_refused(open_data, tmp_path, text, reason):
    (tmp_path / "mix.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"mix.json.*{reason}"):
        open_data("mix.json")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("none.jsonl", r"1 of 1 data sets were not found, e.g. \['.*none.jsonl'\]"),
        ("mm1-sft", r"17 of 17 data sets were not found, e.g. .*text-only-sft"),
        ("none.json", "none.json cannot be read: No such file"),
        ("empty.jsonl", "empty.jsonl has no rows to learn: 0 in 1 files"),
    ],
)
def test_data_that_is_not_there_is_named(open_data, write_lines, name, reason):
    write_lines([], "empty.jsonl")
    with pytest.raises(DataError, match=reason):
        open_data(name)


def test_a_folder_that_is_called_as_a_mixture_is_told_apart(open_data, tmp_path):
    (tmp_path / "mm1-sft").mkdir()
    with pytest.raises(
        DataError, match=r"; mm1-sft is a mixture, \./mm1-sft the folder"
    ):
        open_data("mm1-sft")


def test_no_data_is_refused(open_data):
    with pytest.raises(DataError, match="no data is named; give files, folders or a m"):
        open_data()


# Validation


def test_held_out_rows_are_never_learned(open_data, write_lines):
    write_lines(named("a", 400))
    learned = open_data("rows.jsonl", held_out=0.1)
    kept = open_data("rows.jsonl", held_out=0.1, part="valid", seed=5)
    assert len(learned) + len(kept) == 400
    assert len(kept) == pytest.approx(40, abs=2)
    left = set(texts(learned, range(len(learned))))
    right = set(texts(kept, range(len(kept))))
    assert not left & right
    assert len(left | right) == 400


def test_what_is_held_out_lies_all_over_the_file():
    rows = choose_rows(10_000, 0.05, "valid")
    assert len(rows) == pytest.approx(500, abs=3)
    per_tenth = [sum(i * 1000 <= r < (i + 1) * 1000 for r in rows) for i in range(10)]
    assert all(abs(count - 50) <= 4 for count in per_tenth)
    # No matter what comes every few rows.
    for period in range(2, 12):
        counts = [sum(rows % period == phase) for phase in range(period)]
        assert max(counts) - min(counts) < 0.25 * 500 / period + 6


def test_held_out_rows_of_parquet_keep_their_blocks(open_data, write_parquet):
    write_parquet(named("p", 50), group=4)
    parts = [
        open_data("rows.parquet", held_out=0.3, part=part)
        for part in ("train", "valid")
    ]
    found = [set(texts(part, range(len(part)))) for part in parts]
    assert sum(map(len, found)) == 50
    assert found[0] | found[1] == {f"p{i}" for i in range(50)}


def test_too_few_rows_to_hold_out_are_refused(open_data, write_lines):
    write_lines(named("a", 1))
    with pytest.raises(
        DataError, match=r"has no rows to learn: 1 in 1 .*, of which 0.9"
    ):
        open_data("rows.jsonl", held_out=0.9)


# Identity


def test_an_identity_is_of_everything_the_examples_depend_on(open_data, write_lines):
    write_lines(named("a", 9), "a.jsonl")
    write_lines(named("b", 9), "b.jsonl")
    same = {open_data("a.jsonl").identity() for _ in range(2)}
    assert len(same) == 1
    others = {
        open_data("b.jsonl").identity(),
        open_data("a.jsonl", seed=1).identity(),
        open_data("a.jsonl:2").identity(),
        open_data("a.jsonl", held_out=0.2).identity(),
        open_data("a.jsonl", "b.jsonl").identity(),
    }
    assert len(others - same) == 5


def test_an_identity_does_not_depend_on_where_the_data_lies(write_lines, tmp_path):
    found = set()
    for folder in ("here", "there"):
        write_lines(named("a", 9), f"{folder}/a.jsonl")
        found.add(open_mixture(["a.jsonl"], root=tmp_path / folder).identity())
    assert len(found) == 1


# Prompts


def test_prompts_are_drawn_by_position(open_data, write_lines, tmp_path):
    rows = [{"question": str(i), "answer": "x"} for i in range(60)]
    write_lines(rows, "a.jsonl")
    prompts = ["One.", "Two.", "Three."]
    spec = {"datasets": [{"path": "a.jsonl", "prompts": prompts}]}
    (tmp_path / "mix.json").write_text(json.dumps(spec))
    asked = texts(open_data("mix.json"), range(60))
    drawn = [text.partition("\n")[2] for text in asked]
    assert all(12 <= drawn.count(prompt) <= 28 for prompt in prompts)
    assert texts(open_data("mix.json"), range(60)) == asked


# The mixtures that are shipped


def slug(name):
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


TRANSCRIBE = "Please transcribe all the text in the picture."
# MM1's table 5: thousands of examples, and what is added to every question.
TABLE_5 = {
    "Text-only SFT": (13, None),
    "LLaVA-Conv": (57, None),
    "LLaVA-Complex": (77, None),
    "ShareGPT-4V": (102, None),
    "VQAv2": (83, SHORT_ANSWER),
    "GQA": (72, SHORT_ANSWER),
    "OKVQA": (9, SHORT_ANSWER),
    "OCRVQA": (80, SHORT_ANSWER),
    "DVQA": (200, SHORT_ANSWER),
    "ChartQA": (18, SHORT_ANSWER),
    "AI2D": (3, SHORT_ANSWER),
    "DocVQA": (39, SHORT_ANSWER),
    "InfoVQA": (24, SHORT_ANSWER),
    "A-OKVQA": (66, LETTER),
    "COCO Captions": (83, CAPTION),
    "TextCaps": (22, CAPTION),
    "SynthDog-EN": (500, TRANSCRIBE),
}
PAPERS = {
    "pretraining-45-45-10": {"caption": 45, "interleaved": 45, "text": 10},
    "mm1-sft": {name: thousands for name, (thousands, _) in TABLE_5.items()},
    # MM1.5 (arXiv 2409.20566), in percent.
    "mm1.5-pretraining": {"caption": 50.0, "interleaved": 10.0, "text": 40.0},
    "mm1.5-continual": dict.fromkeys(
        ("PDFA", "IDL", "RenderedText", "DocStruct-4M"), 25.0
    ),
    "mm1.5-sft": {
        "text-rich": 37.2,
        "refer-and-ground": 22.5,
        "general": 11.3,
        "math": 5.6,
        "code": 2.3,
        "science": 1.1,
        "multi-image": 10.0,
        "text": 10.0,
    },
}


def test_every_mixture_of_the_papers_is_shipped():
    assert shipped_mixtures() == sorted(PAPERS)


@pytest.mark.parametrize("name", PAPERS)
def test_a_shipped_mixture_is_the_papers(name):
    datasets = read_mixture(SPECS / f"{name}.json").datasets
    assert {d.name: d.weight for d in datasets} == PAPERS[name]
    assert [d.path for d in datasets] == [slug(d.name) for d in datasets]
    if name != "mm1.5-continual" and name != "mm1-sft":
        assert sum(d.weight for d in datasets) == pytest.approx(100)


def test_the_prompts_of_table_5_are_the_papers_and_ours():
    datasets = read_mixture(SPECS / "mm1-sft.json").datasets
    for spec, (_, prompt) in zip(datasets, TABLE_5.values(), strict=True):
        assert spec.prompts[:1] == ((prompt,) if prompt else ())
        # Only captions and transcriptions are asked for in several ways.
        sampled = prompt in (CAPTION, TRANSCRIBE)
        assert (len(set(spec.prompts)) == 5) if sampled else len(spec.prompts) <= 1


def test_table_5_is_mixed_from_a_root(open_data, write_lines):
    for name in TABLE_5:
        rows = [{"question": name, "answer": str(i)} for i in range(3)]
        write_lines(rows, f"{slug(name)}.jsonl")
    mixture = open_data("mm1-sft")
    counts = mixture.count(1448)
    assert counts == pytest.approx(
        [thousands for thousands, _ in TABLE_5.values()], abs=3
    )
    asked = {text.partition("\n")[0]: text for text in texts(mixture, range(1448))}
    assert asked["VQAv2"] == f"VQAv2\n{SHORT_ANSWER}"
    assert asked["A-OKVQA"] == f"A-OKVQA\n{LETTER}"
    assert asked["LLaVA-Conv"] == "LLaVA-Conv"
