"""Paths as terminals drop them, and as people type them."""

import os
from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from mm1_mlx.apps.chat.paths import split_paths, take_pictures
from mm1_mlx.apps.chat.reader import ChatCompleter, escaped, last_word
from mm1_mlx.captions.folder import SUFFIXES

NAMES = (
    "a.png",
    "my photo (1).JPG",
    "it's.png",
    'say "hi".webp',
    "back\\slash.png",
    "ünï cödé\u202f9.41.png",
    "$HOME & more.gif",
    "100%.png",
)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "a folder"
    folder.mkdir()
    for name in NAMES:
        (folder / name).touch()
    (folder / "notes.txt").touch()
    return folder


def quoted(path):
    return "'" + str(path).replace("'", "'\\''") + "'"


def url(path):
    return path.as_uri()


WAYS = {
    "as they are": str,
    "escaped": lambda path: escaped(str(path)),
    "quoted": quoted,
    "urls": url,
    "urls of this machine": lambda path: url(path).replace("///", "//localhost/", 1),
}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@each_way
@pytest.mark.parametrize("name", NAMES)
def test_a_dropped_picture_is_taken(folder, way, name):
    path = folder / name
    for line in (way(path), f"  {way(path)} "):
        assert take_pictures(line, SUFFIXES) == ([path], "")
    line = f"{way(path)} What is this?"
    assert take_pictures(line, SUFFIXES) == ([path], "What is this?")
    line = f"What is this? {way(path)}"
    assert take_pictures(line, SUFFIXES) == ([path], "What is this?")


@each_way
def test_several_at_once_keep_their_order(folder, way):
    paths = [folder / name for name in reversed(NAMES)]
    for between in (" ", "\n"):
        line = between.join(map(way, paths))
        assert take_pictures(line, SUFFIXES) == (paths, "")


@each_way
@pytest.mark.parametrize("name", NAMES)
def test_image_takes_them_in_the_same_ways(folder, way, name):
    assert split_paths(way(folder / name)) == [folder / name]
    both = f"{way(folder / name)} {way(folder / 'a.png')}"
    assert split_paths(both) == [folder / name, folder / "a.png"]


@pytest.mark.parametrize("name", NAMES)
def test_image_takes_relative_paths(folder, monkeypatch, name):
    monkeypatch.chdir(folder)
    assert split_paths(f"{name} {escaped(name)}") == [Path(name)] * 2


def test_home_is_known(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert split_paths("~/my photo (1).JPG") == [folder / "my photo (1).JPG"]
    assert take_pictures("~/a.png Hi", SUFFIXES) == ([folder / "a.png"], "Hi")


@pytest.mark.parametrize(
    "line",
    [
        "What is a.png?",
        "a.png",
        "Is /no/such/file.png there?",
        "/image a.png",
        "it's what/ever",
        "'/unclosed",
        "/" + "a" * 5000,
        "file://",
        "file://[x.png what",
        "~",
        "\0/a.png",
        "",
    ],
)
def test_other_lines_stay_as_they_are(folder, monkeypatch, line):
    monkeypatch.chdir(folder)
    assert take_pictures(line, SUFFIXES) == ([], line)


def test_files_of_other_kinds_are_not_dropped_pictures(folder):
    line = f"What does {folder}/notes.txt say?"
    assert take_pictures(line, SUFFIXES) == ([], line)
    assert split_paths(f"'{folder}/notes.txt'") == [folder / "notes.txt"]


def test_what_does_not_exist_is_named_as_it_was_spelled():
    assert split_paths("no\\ such.png 'nor this.png'") == [
        Path("no such.png"), Path("nor this.png"),
    ]  # fmt: skip
    assert split_paths("it's") == [Path("it's")]


def completed(text):
    """The texts that Tab offers in place of what was typed."""
    completer = ChatCompleter(
        [("/image", "shows"), ("/images", "lists"), ("/q", "ends")]
    )
    document = Document(text, len(text))
    return [
        text[: len(text) + one.start_position] + one.text
        for one in completer.get_completions(document, CompleteEvent())
    ]


def test_commands_are_completed():
    assert completed("/im") == ["/image", "/images"]
    assert completed("im") == []
    assert completed("what /im") == []


@pytest.mark.parametrize("name", NAMES)
def test_paths_are_completed_as_they_can_be_read_back(folder, monkeypatch, name):
    monkeypatch.chdir(folder)
    begun = escaped(name[: max(1, len(name) - 5)])
    (line,) = [x for x in completed(f"/image a.png {begun}") if "notes" not in x]
    assert split_paths(line.removeprefix("/image ")) == [Path("a.png"), Path(name)]
    (line,) = completed(f"Look: {escaped(str(folder))}/{begun}")
    assert take_pictures(line, SUFFIXES) == ([folder / name], "Look:")


def test_folders_are_completed_up_to_their_slash(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert completed("/load a") == ["/load a\\ folder/"]
    (folder.parent / ".hidden").mkdir()
    assert completed("/load ") == ["/load a\\ folder/"]
    assert completed("/load .h") == ["/load .hidden/"]
    assert completed("/load no/such/") == []


def test_the_last_word_begins_behind_a_space_that_is_not_escaped():
    assert last_word("a\\ b c\\ d") == "c\\ d"
    assert last_word("") == ""
    assert os.sep not in last_word("a b")
