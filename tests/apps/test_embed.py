"""``mm1 embed``: what it prints, where, and how it fails."""

import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from mm1_mlx.apps.cli import main
from mm1_mlx.embed import classify, embed_images, embed_texts, load_embedder
from mm1_mlx.runtime import TINY

STAR, FOUR = str(TINY / "red-star.png"), str(TINY / "four-shapes.png")


@pytest.fixture
def mm1(monkeypatch, capfd):
    """Run the command; exit status, stdout, stderr."""

    def run(*arguments, stdin=b""):
        monkeypatch.setattr(sys, "argv", ["mm1", "embed", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return ended.value.code or 0, out, err

    return run


def test_vectors_are_one_json_object(mm1, clip_folder):
    arguments = ("-m", clip_folder, "-i", STAR, "-i", FOUR, "--text", "a red star")
    code, out, err = mm1(*arguments)
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert [row["image"] for row in result["images"]] == [STAR, FOUR]
    assert [row["text"] for row in result["texts"]] == ["a red star"]
    embedder = load_embedder(clip_folder)
    images = [row["embedding"] for row in result["images"]]
    assert np.array_equal(np.float32(images), embed_images(embedder, [STAR, FOUR]))
    written = np.float32(result["texts"][0]["embedding"])
    assert np.array_equal(written, embed_texts(embedder, ["a red star"])[0])
    np.testing.assert_allclose(np.linalg.norm(images, axis=-1), 1, rtol=1e-6)
    assert mm1(*arguments, "--json") == (0, out, "")


def test_a_picture_is_read_from_stdin(mm1, clip_folder):
    star = Path(STAR).read_bytes()
    code, out, _ = mm1("-m", clip_folder, "-i", "-", stdin=star)
    _, named, _ = mm1("-m", clip_folder, "-i", STAR)
    assert code == 0
    rows = [json.loads(text)["images"][0] for text in (out, named)]
    assert rows[0]["embedding"] == rows[1]["embedding"]
    assert json.loads(out)["texts"] == []


def test_a_text_is_read_from_stdin(mm1, clip_folder):
    code, out, _ = mm1("-m", clip_folder, "--text", "-", stdin=b"a red star\n")
    _, named, _ = mm1("-m", clip_folder, "--text", "a red star")
    assert (code, out) == (0, named)


def test_the_model_may_be_named_by_the_environment(mm1, clip_folder, monkeypatch):
    monkeypatch.setenv("MM1_MODEL", str(clip_folder))
    assert mm1("-i", STAR)[:2] == mm1("-m", clip_folder, "-i", STAR)[:2]


def test_classes_are_a_table_of_probabilities(mm1, clip_folder):
    names = ["comet", "circle", "[red] square"]
    template = ["--template", "{}!"]
    arguments = ("-m", clip_folder, "-i", STAR, "--classes", ", ".join(names))
    code, out, err = mm1(*arguments, *template)
    assert (code, err) == (0, "")
    expected = classify(load_embedder(clip_folder), [STAR], names, "{}!")[0]
    ranked = [names[i] for i in np.argsort(-expected)]
    places = [out.index(name) for name in ranked]
    assert places == sorted(places)
    for probability in expected:
        assert f"{probability:.1%}" in out
    code, out, _ = mm1(*arguments, *template, "--json")
    result = json.loads(out)
    assert result["classes"] == names
    assert result["images"][0]["image"] == STAR
    assert np.allclose(result["images"][0]["probabilities"], expected)
    _, other, _ = mm1(*arguments, "--json")
    assert other != out


def test_a_model_without_the_space_says_the_way_out(mm1):
    code, out, err = mm1("-m", TINY, "-i", STAR)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert "no space that pictures and texts share; convert a whole CLIP model" in err
    assert err.count("\n") == 1


def test_a_model_without_a_tokenizer_embeds_pictures_alone(mm1, clip_folder, tmp_path):
    bare = shutil.copytree(clip_folder, tmp_path / "bare")
    manifest = json.loads((bare / "manifest.json").read_text())
    for path in bare.glob("tokenizer*"):
        del manifest["files"][path.name]
        path.unlink()
    (bare / "manifest.json").write_text(json.dumps(manifest))
    assert mm1("-m", bare, "-i", STAR)[0] == 0
    code, _, err = mm1("-m", bare, "--text", "a star")
    assert code == 1
    assert "has no tokenizer, so it cannot embed texts; put the files" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --image or --text"),
        (["-i", "-", "-i", "-"], "stdin can be read once"),
        (["-i", "-", "--text", "-"], "stdin can be read once"),
        (["-i", STAR], "name a CLIP model by -m, or by $MM1_MODEL"),
        (["-i", STAR, "--template", "a {}"], "--template is how --classes are written"),
        (["-i", STAR, "--classes", " , "], "--classes is empty"),
        (["--classes", "a,b"], "--classes needs an --image"),
        (["-i", STAR, "--classes", "a", "--text", "b"], "not both"),
    ],
)
def test_what_cannot_be_asked_is_a_usage_error(arguments, message, mm1, monkeypatch):
    monkeypatch.delenv("MM1_MODEL", raising=False)
    code, out, err = mm1(*arguments)
    assert (code, out) == (2, "")
    assert message in " ".join(err.replace("│", " ").split())


def test_a_template_without_a_place_is_an_error(mm1, clip_folder):
    code, _, err = mm1(
        *("-m", clip_folder, "-i", STAR, "--classes", "a", "--template", "b")
    )
    assert code == 1
    assert "has no {} for the class" in err
