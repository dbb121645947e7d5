"""Named prefixes: saved by one process, continued by another, refused elsewhere."""

import hashlib
import json
import shutil
import subprocess
import sys

import mlx.core as mx
import pytest
from PIL import Image

from mm1_mlx import generate, load
from mm1_mlx.errors import MM1Error, PromptError
from mm1_mlx.memory.named import CACHE, RECORD, Prefix, drop, names, saved
from mm1_mlx.runtime import TINY
from mm1_mlx.shots import Shot

STAR = TINY / "red-star.png"
FOUR = TINY / "four-shapes.png"
SHOTS = (
    Shot((STAR,), "red", "What colour is the star?"),
    Shot((FOUR,), "4", "How many shapes are there?"),
)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MM1_CACHE", str(folder))
        yield folder / "prefixes"


@pytest.fixture(scope="module", autouse=True)
def runtime(folder):
    assert not folder.exists()
    with load() as runtime:
        runtime.save_prefix(Prefix("shots", "You count.", shots=SHOTS))
        runtime.save_prefix(Prefix("page", images=(FOUR,)))
        yield runtime


@pytest.fixture
def other():
    """Another runtime of the same model, which remembers nothing."""
    with load() as other:
        yield other


def test_an_answer_behind_examples_equals_the_whole_prompts(other, embedded):
    system = {"role": "system", "content": "You count."}
    user = {"role": "user", "content": [
        {"type": "image", "image": FOUR},
        {"type": "text", "text": "How many circles are there?"},
    ]}  # fmt: skip
    whole = generate(other, [system, user], shots=SHOTS)
    other.forget()
    behind = generate(other, "How many circles are there?", [FOUR], prefix="shots")
    assert behind.tokens == whole.tokens
    assert behind.prompt_tokens == whole.prompt_tokens
    # Only the question and its picture are new.
    picture = embedded.num_image_tokens
    assert behind.prompt_tokens - behind.cached_tokens < picture + 20
    assert behind.cached_tokens > 2 * picture


def test_a_kept_picture_comes_before_the_questions_own(other, embedded):
    whole = generate(other, "Describe the first.", [FOUR, STAR])
    other.forget()
    behind = generate(other, "Describe the first.", [STAR], prefix="page")
    assert behind.tokens == whole.tokens
    assert behind.image_tokens == 2 * embedded.num_image_tokens
    assert behind.cached_tokens >= embedded.num_image_tokens


def test_nothing_kept_is_encoded_or_read_again(other, monkeypatch):
    encoded = []
    encode = other.model.encode
    monkeypatch.setattr(
        other.engine.features, "_encode", lambda x: encoded.extend(x) or encode(x)
    )
    generate(other, "What?", [STAR], prefix="page")
    assert len(encoded) == 1


def test_another_process_continues_it(runtime):
    code = (
        "import sys; from mm1_mlx import load, generate\n"
        "with load() as r:\n"
        "    a = generate(r, 'How many shapes are there?', prefix='page')\n"
        "    print(a.text, a.cached_tokens)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    text, cached = done.stdout.split()
    assert text == generate(runtime, "How many shapes are there?", [FOUR]).text == "4"
    assert int(cached) >= 16


def test_packed_keys_continue_it_too(other):
    options = {"kv_bits": 8, "kv_start": 0}
    answer = generate(other, "How many shapes?", prefix="page", **options)
    assert answer.cached_tokens >= 16
    assert answer.text.startswith("4")


def test_pictures_in_memory_are_kept_as_they_are_seen(runtime, other):
    picture = Image.open(STAR).convert("RGB")
    runtime.save_prefix(Prefix("memory", images=(picture,)))
    answer = generate(other, "What colour is the star?", prefix="memory")
    assert (answer.text, answer.cached_tokens >= 16) == ("red", True)


def test_a_prefix_of_another_precision_is_refused():
    with (
        load(dtype=mx.float16) as half,
        pytest.raises(
            PromptError, match=r"for that model in another .* of '.*tiny'; sa"
        ),
    ):
        generate(half, "What?", prefix="page")


def test_a_prefix_of_another_model_says_which(tmp_path):
    copy = tmp_path / "other"
    shutil.copytree(TINY, copy)
    config = json.loads((copy / "config.json").read_text())
    config["decoder"]["rope_theta"] *= 2
    text = json.dumps(config).encode()
    (copy / "config.json").write_bytes(text)
    manifest = json.loads((copy / "manifest.json").read_text())
    digest = hashlib.sha256(text).hexdigest()
    manifest["files"]["config.json"] = {"bytes": len(text), "sha256": digest}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    message = (
        r"^prefix 'page' was saved for '.*/tiny', and asked of '.*/other'; save it"
    )
    with load(copy) as other, pytest.raises(PromptError, match=message):
        generate(other, "What?", prefix="page")


def test_an_unknown_name_says_which_are_known(runtime):
    with pytest.raises(PromptError, match=r"no prefix 'pages', known: .*page.*shots"):
        generate(runtime, "What?", prefix="pages")


@pytest.mark.parametrize("name", ["../page", "", ".hidden", "a/b", "x" * 300])
def test_a_name_that_is_a_path_is_refused(runtime, name):
    with pytest.raises(PromptError, match=r"prefix name .* is not allowed"):
        runtime.save_prefix(Prefix(name, "text"))


def test_nothing_is_no_prefix(runtime, folder):
    with pytest.raises(PromptError, match="the prefix is empty"):
        runtime.save_prefix(Prefix("nothing"))
    assert "nothing" not in names(folder)


def test_two_system_messages_or_examples_are_refused(runtime):
    system = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "What?"},
    ]
    with pytest.raises(PromptError, match="has a system message, and so has"):
        generate(runtime, system, prefix="shots")
    with pytest.raises(PromptError, match="has examples, and so has"):
        generate(runtime, "What?", shots=SHOTS, prefix="shots")


def test_what_is_kept_is_listed_and_dropped(runtime, folder):
    runtime.save_prefix(Prefix("short", "You count."))
    found = {one.name: one for one in saved(folder)}
    assert found["page"].pictures == 1
    assert found["shots"].pictures == 2
    assert found["shots"].tokens > found["page"].tokens > 16
    assert found["page"].bytes > 10_000
    drop(folder, "short")
    assert "short" not in names(folder)
    with pytest.raises(PromptError, match="no prefix 'short'"):
        drop(folder, "short")


def test_saving_again_replaces(runtime, folder, embedded):
    runtime.save_prefix(Prefix("again", "One."))
    runtime.save_prefix(Prefix("again", images=(STAR,)))
    assert json.loads((folder / "again" / RECORD).read_text())["system"] is None
    answer = generate(runtime, "What colour?", prefix="again")
    assert answer.image_tokens == embedded.num_image_tokens


@pytest.mark.parametrize("damage", ["cut", "other", "version"])
def test_damage_is_named(other, folder, damage):
    place = folder / damage
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder / "page", place)
    cache, record = place / CACHE, place / RECORD
    if damage == "cut":
        cache.write_bytes(cache.read_bytes()[:-9])
    elif damage == "other":
        shutil.copy(folder / "shots" / CACHE, cache)
    else:
        values = json.loads(record.read_text()) | {"format_version": 9}
        record.write_text(json.dumps(values))
    with pytest.raises(MM1Error, match=r"damaged|do not belong"):
        generate(other, "What?", prefix=damage)


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": None}, {"tokens": ["a"]}, {"spans": [[0, 1]]}, {"shots": [{}]},
        {"spans": [[0, 10_000, "digest", 0]]}, {"images": [1]}, {"system": 3},
        {"fingerprint": None}, None,
    ],
)  # fmt: skip
def test_a_damaged_record_is_named_and_listed(runtime, folder, change):
    place = folder / "broken"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(folder / "page", place)
    record = place / RECORD
    values = json.loads(record.read_text())
    record.write_text("{" if change is None else json.dumps(values | change))
    with pytest.raises(PromptError, match=r"prefix 'broken' is damaged"):
        generate(runtime, "What?", prefix="broken")
    found = {one.name: one for one in saved(folder)}
    assert (found["broken"].model, found["broken"].tokens) == ("", 0)
    assert found["page"].tokens > 16
    drop(folder, "broken")


def test_what_a_killed_save_left_is_swept_away(runtime, folder):
    left = folder / ".swept.partial-99999"
    shutil.copytree(folder / "page", left)
    assert ".swept.partial-99999" not in names(folder)
    runtime.save_prefix(Prefix("swept", "One."))
    assert not left.exists()
    assert "swept" in names(folder)


def test_a_failed_save_leaves_the_old_one(runtime, folder, monkeypatch):
    runtime.save_prefix(Prefix("safe", "One."))

    def full(*_):
        raise RuntimeError("[write] Unable to write")

    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(PromptError, match="is the disk full"):
        runtime.save_prefix(Prefix("safe", "Two."))
    assert json.loads((folder / "safe" / RECORD).read_text())["system"] == "One."
    assert [p for p in folder.iterdir() if "partial" in p.name] == []
