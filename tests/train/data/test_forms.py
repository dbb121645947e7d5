"""The rows of public data sets become turns and documents; bad ones are named."""

import base64
from pathlib import Path

import pytest
from PIL import Image

from mm1_mlx.errors import DataError
from mm1_mlx.messages import Region
from mm1_mlx.train.data.example import Record
from mm1_mlx.train.data.forms import FORMS, read_example
from mm1_mlx.train.data.pictures import PictureFolder
from mm1_mlx.train.paper import LETTER, SHORT_ANSWER

FOLDER = PictureFolder(Path("/data"))


def read(values, form=None, prompt=None):
    record = Record(values, "rows.jsonl:17", Path("/data"))
    return read_example(record, FOLDER, form, prompt)


def said(*pairs):
    """LLaVA's turns."""
    return [{"from": speaker, "value": text} for speaker, text in pairs]


QA = said(("human", "What?"), ("gpt", "A cat."))
A, B = Path("/data/a.png"), Path("/data/b.png")

CONVERSATIONS = {
    "llava": (
        {"id": 7, "image": "a.png", "conversations": said(
            ("human", "<image>\nWhat?"), ("gpt", "A <image>."), ("human", "Sure?"), ("gpt", "Yes."),
        )},
        [("user", [None, "What?"]), ("assistant", ["A <image>."]),
         ("user", ["Sure?"]), ("assistant", ["Yes."])],
        [A],
    ),
    "llava, picture behind its question": (
        {"image": "a.png", "conversations": said(("human", "What?\n<image>"), ("gpt", "x"))},
        [("user", [None, "What?"]), ("assistant", ["x"])],
        [A],
    ),
    "llava, two pictures where they stand": (
        {"image": ["a.png", "b.png"], "conversations": said(
            ("system", "Be kind."), ("human", "Is <image> like <image>\n?"), ("gpt", "x"))},
        [("system", ["Be kind."]), ("user", ["Is ", None, " like ", None, "?"]),
         ("assistant", ["x"])],
        [A, B],
    ),
    "llava, no places": (
        {"images": ["a.png", "b.png"], "conversations": [*QA, *QA]},
        [("user", [None, None, "What?"]), ("assistant", ["A cat."]),
         ("user", ["What?"]), ("assistant", ["A cat."])],
        [A, B],
    ),
    "llava, text alone": (
        {"image": None, "conversations": QA},
        [("user", ["What?"]), ("assistant", ["A cat."])],
        [],
    ),
    "messages, picture in its part": (
        {"messages": [
            {"role": "user", "content": [
                {"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"},
                {"type": "image", "path": "b.png", "text": None}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}]},
        [("user", [None, "What?", None]), ("assistant", ["A cat."])],
        [A, B],
    ),
    "messages, pictures in a column": (
        {"images": [{"bytes": b"png", "path": None}, {"bytes": None, "path": "b.png"}], "messages": [
            {"role": "user", "content": [
                {"type": "image", "text": None}, {"type": "text", "text": "and"}, {"type": "image"}]},
            {"role": "assistant", "content": "Cats."}]},
        [("user", [None, "and", None]), ("assistant", ["Cats."])],
        [b"png", B],
    ),
    "messages, places in the text": (
        {"images": ["a.png"], "messages": [
            {"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "x"}]},
        [("user", [None, "What?"]), ("assistant", ["x"])],
        [A],
    ),
    "messages, places in a part": (
        {"images": ["a.png", "b.png"], "messages": [
            {"role": "user", "content": [
                {"type": "text", "text": "Is <image>\nlike"}, {"type": "text", "text": " <image>"}]},
            {"role": "assistant", "content": "x"}]},
        [("user", ["Is ", None, "like ", None]), ("assistant", ["x"])],
        [A, B],
    ),
    "messages, a place behind the question in its only part": (
        {"images": ["a.png"], "messages": [
            {"role": "user", "content": [{"type": "text", "text": "What?\n<image>"}]},
            {"role": "assistant", "content": "x"}]},
        [("user", [None, "What?"]), ("assistant", ["x"])],
        [A],
    ),
    "turns": (
        {"images": [b"one"], "texts": [
            {"user": "What?", "assistant": "A cat.", "source": "s"}, {"user": "Sure?", "assistant": "Yes."}]},
        [("user", [None, "What?"]), ("assistant", ["A cat."]),
         ("user", ["Sure?"]), ("assistant", ["Yes."])],
        [b"one"],
    ),
    "question": (
        {"image": {"bytes": b"one", "path": "x"}, "question": "What?", "answer": "A cat.", "caption": None},
        [("user", [None, "What?"]), ("assistant", ["A cat."])],
        [b"one"],
    ),
}  # fmt: skip

OPTIONS = "A. nest\nB. den"
TEN = [
    {"answer": x, "answer_id": i}
    for i, x in enumerate(["net", "cat", "net", "cat", "cat"])
]
CONVERSATIONS |= {
    "question, ten people's answers": (
        {"image": "a.png", "question": "What?", "answers": TEN},
        [("user", [None, "What?"]), ("assistant", ["cat"])],
        [A],
    ),
    "question, of ChartQA": (
        {"image": "a.png", "query": "What?", "label": ["14"], "human_or_machine": 0},
        [("user", [None, "What?"]), ("assistant", ["14"])],
        [A],
    ),
    "question, a number": (
        {"question": "How many?", "answer": 3},
        [("user", ["How many?"]), ("assistant", ["3"])],
        [],
    ),
    "question, of AI2D": (
        {"image": "a.png", "question": "What?", "options": ["nest", "den"], "answer": "1"},
        [("user", [None, f"What?\n{OPTIONS}\n{LETTER}"]), ("assistant", ["B"])],
        [A],
    ),
    "question, of A-OKVQA": (
        {"image": "a.png", "question": "What?", "choices": ["nest", "den"], "answer": "nest"},
        [("user", [None, f"What?\n{OPTIONS}\n{LETTER}"]), ("assistant", ["A"])],
        [A],
    ),
    "question, of ScienceQA": (
        {"question": "What?", "choices": ["nest", "den"], "answer": 1, "hint": "Dens are cold. ", "image": None},
        [("user", [f"Context: Dens are cold.\nWhat?\n{OPTIONS}\n{LETTER}"]), ("assistant", ["B"])],
        [],
    ),
    "completion": (
        {"prompt": "What?", "completion": "A cat."},
        [("user", ["What?"]), ("assistant", ["A cat."])],
        [],
    ),
    "messages, by another name": (
        {"conversations": [
            {"role": "user", "content": "What?"}, {"role": "assistant", "content": "x"}]},
        [("user", ["What?"]), ("assistant", ["x"])],
        [],
    ),
}  # fmt: skip

DOCUMENTS = {
    "caption": ({"image": "a.png", "caption": " A cat. "}, [None, " A cat."], [A]),
    "captions": ({"image": "a.png", "captions": ["A cat.", "One."]}, [None, " A cat."], [A]),
    "captions in a list": ({"image": "a.png", "caption": ["A cat.", "One."]}, [None, " A cat."], [A]),
    "caption behind its place": ({"image": "a.png", "caption": "<image>\nA cat."}, [None, " A cat."], [A]),
    "text of a picture": ({"file_name": "a.png", "text": "A cat."}, [None, " A cat."], [A]),
    "interleaved": (
        {"texts": ["Once", None, "a cat", "sat.", None, None],
         "images": [None, "a.png", None, None, "b.png", b"c"]},
        ["Once\n", None, " a cat\nsat.\n", None, None],
        [A, B, b"c"],
    ),
    "parts": (
        {"parts": ["Once ", {"type": "image", "image": "a.png"}, "a cat", {"type": "image"}],
         "images": ["b.png"]},
        ["Once ", None, "a cat", None],
        [A, B],
    ),
    "text": ({"text": "Once.", "image": None, "url": "x"}, ["Once."], []),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_conversation_is_its_turns(name):
    values, turns, images = CONVERSATIONS[name]
    example = read(values)
    assert list(example.turns) == turns
    assert list(example.images) == images
    assert example.kind == "conversation"
    assert example.origin == "rows.jsonl:17"
    assert read(values, form=name.partition(",")[0]) == example


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_is_its_parts(name):
    values, parts, images = DOCUMENTS[name]
    example = read(values)
    assert example.parts == parts
    assert list(example.images) == images
    assert example.kind == "document"


def test_a_typed_place_is_text_where_the_form_is_named():
    asked = {"role": "user", "content": "What is <image>?"}
    row = {"messages": [asked, {"role": "assistant", "content": "x"}], "videos": ["v"]}
    assert read(row, form="messages").turns[0] == ("user", ["What is <image>?"])


def test_answers_of_no_weight_are_only_read():
    answers = [{"role": "assistant", "content": x, "weight": w} for x, w in WEIGHED]
    row = {"messages": [x for answer in answers for x in (ASKED, answer)]}
    example = read(row)
    assert example.unlearned == {1}
    assert len(example.turns) == 6


def test_a_data_uri_is_a_picture():
    uri = "data:image/png;base64," + base64.b64encode(b"x").decode()
    content = [{"type": "image_url", "image_url": {"url": uri}}]
    answer = {"role": "assistant", "content": "x"}
    example = read({"messages": [{"role": "user", "content": content}, answer]})
    assert example.images == (uri,)
    assert read({"image": uri, "caption": "x"}).images == (uri,)


def test_an_image_url_may_name_a_file_of_the_folder():
    def asked(url):
        content = [
            {"type": "image_url", "image_url": url},
            {"type": "text", "text": "?"},
        ]
        answer = {"role": "assistant", "content": "x"}
        return {"messages": [{"role": "user", "content": content}, answer]}

    named = read({"image": "cat.png", "caption": "x"}).images
    for url in ("cat.png", {"url": "cat.png"}):
        assert read(asked(url)).images == named
    for url, reason in (
        ("../../cat.png", "lies outside"),
        ("https://example.org/cat.png", "download it first"),
        ("file:///cat.png", "is a URL"),
        (None, "expected a path"),
    ):
        with pytest.raises(DataError, match=reason):
            read(asked(url))


def test_a_region_is_one_of_its_picture():
    content = [{"type": "image"}, {"type": "region", "box": [1, 2, 3, 4]}]
    answer = {"role": "assistant", "content": "x"}
    row = {
        "images": ["a.png"],
        "messages": [{"role": "user", "content": content}, answer],
    }
    assert read(row).turns[0] == ("user", [None, Region("box", [1, 2, 3, 4], 0)])


def test_a_video_is_its_frames(tmp_path):
    names = []
    for i in range(3):
        names.append(f"{i}.png")
        Image.new("RGB", (4, 4)).save(tmp_path / names[-1])
    folder = PictureFolder(tmp_path)
    answer = {"role": "assistant", "content": "x"}
    content = [{"type": "video", "video": names}]
    row = {"messages": [{"role": "user", "content": content}, answer]}
    example = read_example(Record(row, "rows.jsonl:17", tmp_path), folder)
    assert example.turns[0] == ("user", [None] * 3)
    assert len(example.images) == 3
    # Its frames lie in the folder too.
    content[0]["video"] = ["0.png", "../1.png"]
    with pytest.raises(DataError, match=r"jsonl:17: picture '../1.png' lies outside"):
        read_example(Record(row, "rows.jsonl:17", tmp_path), folder)


# Prompts


def test_a_prompt_stands_behind_every_question():
    values = CONVERSATIONS["llava"][0]
    example = read(values, prompt="Be short.")
    assert [parts for role, parts in example.turns if role == "user"] == [
        [None, "What?\nBe short."],
        ["Sure?\nBe short."],
    ]
    # Data sets that were prepared so have it already.
    values = {"question": "What?\nBe short.", "answer": "x"}
    assert read(values, prompt="Be short.").turns[0] == ("user", ["What?\nBe short."])


def test_a_prompt_says_what_answers_options():
    values = CONVERSATIONS["question, of AI2D"][0]
    asked = {
        prompt: read(values, prompt=prompt).turns for prompt in (LETTER, SHORT_ANSWER)
    }
    assert asked[LETTER] == read(values).turns
    assert asked[SHORT_ANSWER] == (
        ("user", [None, f"What?\n{OPTIONS}\n{SHORT_ANSWER}"]),
        ("assistant", ["den"]),
    )


def test_a_prompt_asks_for_a_caption():
    example = read({"image": "a.png", "caption": " A cat. "}, prompt="Describe it.")
    assert list(example.turns) == [
        ("user", [None, "Describe it."]),
        ("assistant", ["A cat."]),
    ]
    assert example.kind == "conversation"


def test_a_document_takes_no_prompt():
    with pytest.raises(
        DataError, match=r"jsonl:17: a document asks nothing, so the pr"
    ):
        read({"text": "Once."}, prompt="Be short.")


# Bad rows

WEIGHED = (("guess", 0), ("x", 1), ("y", None))
ASKED = {"role": "user", "content": "What?"}
BAD = {
    "no keys": ({}, r"a row with the keys \[\] has no form that is known"),
    "unknown keys": (
        {"prompt": "a", "chosen": "b"},
        r"with the keys \['chosen', 'prompt'\] has no form .* the forms are \['llav",
    ),
    "no list": ({"conversations": "a"}, "conversations is 'a', expected a list of turns"),
    "empty": ({"conversations": []}, "it has no turns"),
    "unknown speaker": (
        {"conversations": said(("bot", "x"))},
        r"a turn is from 'bot', expected one of \['human', 'gpt'",
    ),
    "turn without text": (
        {"conversations": [{"from": "human", "value": None}]},
        "value is None, expected text",
    ),
    "unknown role": (
        {"messages": [{"role": "tool", "content": "x"}]},
        "message role 'tool' is not one of",
    ),
    "message of text": ({"messages": ["hi"]}, "a message is 'hi', expected an object"),
    "unknown part": (
        {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
        "message part 'audio' is not one of",
    ),
    "no answer": ({"messages": [ASKED]}, "it has no assistant turn, so nothing is lear"),
    "empty answer": (
        {"messages": [ASKED, {"role": "assistant", "content": " "}]},
        "an assistant turn is empty, expected an answer",
    ),
    "empty answer in a part": (
        {"messages": [ASKED, {"role": "assistant", "content": [{"type": "text", "text": " "}]}]},
        "an assistant turn is empty, expected an answer",
    ),
    "half a weight": (
        {"messages": [ASKED, {"role": "assistant", "content": "x", "weight": 0.5}]},
        "the weight of an assistant turn is 0.5, expected 0 or 1",
    ),
    "no weight": (
        {"messages": [ASKED, {"role": "assistant", "content": "x", "weight": 0}]},
        "every assistant turn has weight 0, so nothing is learned of it",
    ),
    "film": (
        {"video": "a.mp4", "conversations": said(("human", "<video>\nWhat?"), ("gpt", "x"))},
        "its video cannot be shown; give a film's frames as pictures, or name",
    ),
    "sound": ({"audio": {"bytes": b"x"}, "text": "Once."}, "its audio cannot be shown"),
    "messages, a place without a picture": (
        {"picture": "a.png", "messages": [
            {"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "x"}]},
        "it has <image> but no pictures for it; name them as images, or the form 'messages'",
    ),
    "messages, a place in a part without a picture": (
        {"messages": [
            {"role": "user", "content": [{"type": "text", "text": "<image>What?"}]},
            {"role": "assistant", "content": "x"}]},
        "it has <image> but no pictures for it",
    ),
    "messages, a place in a part too many": (
        {"images": ["a.png"], "messages": [
            {"role": "user", "content": [
                {"type": "image"}, {"type": "text", "text": "<image>What?"}]},
            {"role": "assistant", "content": "x"}]},
        r"it has 2 places for pictures \(<image>\) but 1 pictures",
    ),
    "options in a text": (
        {"question": "What?", "options": "['nest', 'den']", "answer": "B"},
        r"its options stand in \['options'\], .*; give them as choices, a list of texts",
    ),
    "options in columns": (
        {"question": "What?", "A": "nest", "B": "den", "answer": "B"},
        r"its options stand in \['A', 'B'\], 'nest'; give them as choices, a list of t",
    ),
    "an option that there is none of": (
        {"question": "What?", "choices": ["nest", "den"], "answer": "lair"},
        "answer is 'lair', expected the number of a choice from 0 to 1",
    ),
    "an option's text that is the number of none": (
        {"question": "How many?", "options": ["1", "2"], "answer": "2"},
        "answer is 2, expected the number of one of the 2 options, from 0; where texts a",
    ),
    "an option's number of thousands of digits": (
        {"question": "What?", "options": ["nest", "den"], "answer": "9" * 5000},
        "answer is '9+, expected the number of a choice from 0 to 1",
    ),
    "a message of no parts": (
        {"messages": [{"role": "user", "content": []},
                      {"role": "assistant", "content": "x"}]},
        "the user message's content is an empty list",
    ),
    "answers of nobody": (
        {"question": "What?", "answers": []},
        "its answers are an empty list, expected one at least",
    ),
    "answers of two kinds": (
        {"question": "What?", "answer": "x", "answers": ["y"]},
        "it has both answer and answers, expected one of them",
    ),
    "captions of nobody": ({"image": "a.png", "captions": []}, "its caption is empty"),
    "place in a caption": (
        {"image": "a.png", "caption": "a red <image> thing"},
        "its caption has <image>, which would be learned as text; leave it out",
    ),
    "more places": (
        {"image": "a.png", "conversations": said(("human", "<image> <image>"), ("gpt", "x"))},
        r"it has 2 places for pictures \(<image>\) but 1 pictures; give one for each pl",
    ),
    "places without pictures": (
        {"conversations": said(("human", "<image> What?"), ("gpt", "x"))},
        "it has 1 places for pictures .* but 0 pictures",
    ),
    "part without picture": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "has more places for pictures than the 0 images given",
    ),
    "both columns": (
        {"image": "a.png", "images": ["a.png"], "caption": "x"},
        "it has both image and images, expected one of them",
    ),
    "unequal lists": (
        {"texts": ["a"], "images": []},
        "it has 1 texts but 0 images, expected as many, null where the other is",
    ),
    "both given": (
        {"texts": ["a"], "images": ["a.png"]},
        r"texts\[0\] and images\[0\] are both given, expected one of them",
    ),
    "both null": ({"texts": [None], "images": [None]}, "are both null, expected one of"),
    "pictures alone": (
        {"texts": [None], "images": ["a.png"]},
        "a document without text teaches nothing",
    ),
    "no caption": ({"image": "a.png", "caption": " "}, "its caption is empty"),
    "caption of nothing": ({"caption": "x"}, "a caption has no picture; name it as ima"),
    "number for text": ({"text": 7}, "text is 7, expected text"),
    "no content": (
        {"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "x"}],
         "images": ["a.png"]},
        "content is None, expected text or a list",
    ),
    "content of a tool": (
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant"}]},
        "content is None, expected text or a list",
    ),
    "half a character": ({"text": "\ud800"}, "is not valid UTF-8"),
    "picture of no kind": ({"image": 7, "caption": "x"}, "a picture is 7, expected a path"),
    "URL": (
        {"image": "https://x.org/a.png", "caption": "x"},
        "picture 'https://x.org/a.png' is a URL, expected a file; download it first",
    ),
    "file URL": ({"image": "file:///a.png", "caption": "x"}, "is a URL, expected a file"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_with_what_is_wrong(name):
    values, reason = BAD[name]
    with pytest.raises(DataError, match=rf"^rows.jsonl:17: .*{reason}"):
        read(values)


@pytest.mark.parametrize("form", FORMS)
def test_a_form_that_is_named_is_not_guessed(form):
    with pytest.raises(DataError, match="jsonl:17: "):
        read({"prompt": "a"}, form=form)


# Paths


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "/etc/passwd",
        "inner/../../secret.png",
        "link.png",
        "folder/secret.png",
        "a\0.png",
        ".",
    ],
)
def test_data_does_not_reach_out_of_its_folder(name, tmp_path):
    (tmp_path / "secret.png").touch()
    data = tmp_path / "data"
    (data / "inner").mkdir(parents=True)
    (data / "link.png").symlink_to(tmp_path / "secret.png")
    (data / "folder").symlink_to(tmp_path)
    record = Record({"image": name, "caption": "x"}, "rows.jsonl:17", data)
    with pytest.raises(DataError, match=r"17: picture .* (lies outside|is no path)"):
        read_example(record, PictureFolder(data))


@pytest.mark.parametrize("name", ["../secret.png", "inner/../../secret.png"])
def test_masks_do_not_reach_out_of_the_datas_folder(name, tmp_path):
    (tmp_path / "secret.png").touch()
    data = tmp_path / "data"
    (data / "inner").mkdir(parents=True)

    def mask_of(name, outside=False):
        region = {"type": "region", "mask": name}
        answer = {"role": "assistant", "content": [region]}
        asked = {"role": "user", "content": [{"type": "image"}]}
        row = {"images": ["a.png"], "messages": [asked, answer]}
        folder = PictureFolder(data, outside)
        return read_example(Record(row, "rows.jsonl:17", data), folder).parts[1].shape

    for path in (name, str(tmp_path / "secret.png")):
        with pytest.raises(DataError, match=r"17: picture .* lies outside"):
            mask_of(path)
    assert mask_of(name, outside=True) == data / name
    # A relative one begins where pictures do.
    assert mask_of("inner/mask.png") == data / "inner/mask.png"


def test_frames_of_a_folder_do_not_reach_out(tmp_path):
    frames = tmp_path / "data" / "frames"
    frames.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    Image.new("RGB", (4, 4)).save(frames / "0.png")
    asked = {"role": "user", "content": [{"type": "video", "video": "frames"}]}
    row = {"messages": [asked, {"role": "assistant", "content": "x"}]}
    record = Record(row, "rows.jsonl:17", tmp_path / "data")
    folder = PictureFolder(tmp_path / "data")
    assert len(read_example(record, folder).images) == 1
    (frames / "1.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match=r"17: picture .* lies outside"):
        read_example(record, folder)


def test_paths_out_of_the_folder_can_be_allowed(tmp_path):
    record = Record({"image": "../a.png", "caption": "x"}, "rows.jsonl:17", tmp_path)
    example = read_example(record, PictureFolder(tmp_path, outside=True))
    assert example.images == (tmp_path / "../a.png",)


@pytest.fixture
def cache(tmp_path):
    """A folder as the hub keeps a repository, with one blob."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "a").touch()
    return tmp_path


# Rows beside their revision's other files, and in a folder of it.
@pytest.mark.parametrize("place", ["snapshots/1", "snapshots/1/data/train"])
def test_links_within_the_folder_and_into_the_hubs_store_are_followed(cache, place):
    data = cache / place
    data.mkdir(parents=True)
    (data / "a.png").symlink_to("../" * (1 + place.count("/")) + "blobs/a")
    (data / "b.png").symlink_to("a.png")
    for name in ("a.png", "b.png"):
        assert PictureFolder(data).find(name) == data / name


@pytest.mark.parametrize("place", ["proj/data", "snapshots/1"])
@pytest.mark.parametrize(
    "source", ["../../blobs/a", "deep/../../../blobs/a", "store/a"]
)
def test_blobs_that_no_link_in_a_snapshot_leads_to_are_outside(cache, place, source):
    data = cache / place
    (data / "deep").mkdir(parents=True)
    (data / "store").symlink_to("../../blobs")
    with pytest.raises(DataError, match=f"{source}' lies outside"):
        PictureFolder(data).find(source)


def test_a_link_into_blobs_beside_no_snapshots_is_outside(cache):
    data = cache / "proj" / "data"
    data.mkdir(parents=True)
    (data / "a.png").symlink_to("../../blobs/a")
    with pytest.raises(DataError, match=r"lies outside"):
        PictureFolder(data).find("a.png")
