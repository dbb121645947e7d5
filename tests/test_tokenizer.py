"""What a user types is text: no picture, no end of turn, and it comes back as it was."""

import json
import random
import shutil
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from mm1_mlx.errors import CheckpointError
from mm1_mlx.tokenizer import load_tokenizer

TYPED = [
    "<image>",
    "</s>",
    "a <image> b",
    "a<image>b</s>c",
    "<image><image></s></s>",
    "</s</s>>",
    "<imag<image>e>",
    "<image>" * 1000,
    "<pad></s>",
    "<s>",
    "<unk>",
    "is </s> a square",
]
PLAIN = [
    "",
    "a red square",
    "Is a? < > / 3",
    "ünïcödé ☃ 漢字 🎨",
    "two\nlines",
    " x",
    "x ",
]


def special_ids(tokenizer):
    return {
        i for i, token in tokenizer.hf.added_tokens_decoder.items() if token.special
    } | set(tokenizer.hf.eos_token_ids)


def encode(tokenizer, text):
    return tokenizer.encode(tokenizer.shield(text), add_special_tokens=False)


def decode(tokenizer, tokens):
    return tokenizer.hf.decode(tokens, skip_special_tokens=False)


@pytest.mark.parametrize("text", TYPED, ids=lambda text: text[:20])
def test_typed_special_tokens_are_text_and_come_back(text, any_tokenizer):
    tokens = encode(any_tokenizer, text)
    assert any_tokenizer.image_id not in tokens
    assert not set(tokens) & special_ids(any_tokenizer)
    assert decode(any_tokenizer, tokens) == text


@pytest.mark.parametrize("text", PLAIN)
def test_text_without_specials_is_tokenised_as_transformers_does(
    text, any_folder, any_tokenizer
):
    reference = AutoTokenizer.from_pretrained(any_folder)
    for special in (False, True):
        tokens = any_tokenizer.encode(
            any_tokenizer.shield(text), add_special_tokens=special
        )
        assert tokens == reference.encode(text, add_special_tokens=special)


@pytest.mark.parametrize("text", PLAIN)
def test_typing_specials_earlier_does_not_change_later_texts(
    text, any_folder, any_tokenizer
):
    encode(any_tokenizer, "<image></s>")
    reference = AutoTokenizer.from_pretrained(any_folder)
    assert encode(any_tokenizer, text) == reference.encode(
        text, add_special_tokens=False
    )


def test_typing_beginnings_earlier_does_not_change_later_texts(any_tokenizer):
    text = "if a < b then x </b>"
    before = encode(any_tokenizer, text)
    for typed in ("x <", "x </", "<ima", "</s", "<"):
        encode(any_tokenizer, typed)
    assert encode(any_tokenizer, text) == before


def test_a_known_beginning_costs_nothing(any_tokenizer, monkeypatch):
    tokens = encode(any_tokenizer, "a <")
    monkeypatch.setattr(type(any_tokenizer), "_add", pytest.fail)
    monkeypatch.setattr(type(any_tokenizer), "spell", pytest.fail)
    assert encode(any_tokenizer, "a <") == tokens


def test_a_templates_own_specials_are_single_tokens(any_tokenizer):
    tokens = any_tokenizer.encode("<image></s>", add_special_tokens=False)
    assert tokens == [any_tokenizer.image_id, any_tokenizer.hf.eos_token_id]


def test_typed_and_written_specials_stay_apart(any_tokenizer):
    text = "<image>" + any_tokenizer.shield("<image>") + "</s>"
    tokens = any_tokenizer.encode(text, add_special_tokens=False)
    assert tokens[0] == any_tokenizer.image_id
    assert tokens[-1] == any_tokenizer.hf.eos_token_id
    assert not set(tokens[1:-1]) & special_ids(any_tokenizer)
    assert decode(any_tokenizer, tokens[1:-1]) == "<image>"


@pytest.mark.parametrize("code", [0xE000, 0xE001, 0xE002, 0xE003, 0xE004, 0xF8FF])
def test_typed_private_use_characters_never_become_specials(code, any_tokenizer):
    encode(any_tokenizer, "<image></s><pad><s><unk>")
    tokens = encode(any_tokenizer, f"a{chr(code)}b")
    assert not set(tokens) & special_ids(any_tokenizer)
    text = decode(any_tokenizer, tokens)
    assert text in (f"a{chr(code)}b", "a\ufffdb")
    assert "<" not in text


def test_private_use_characters_of_the_vocabulary_are_not_taken(
    byte_folder, tmp_path, plain_prompt
):
    shutil.copytree(byte_folder, tmp_path / "model")
    path = tmp_path / "model/tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary |= {chr(0xE000 + i): len(vocabulary) + i for i in range(8)}
    path.write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path / "model", plain_prompt())
    tokens = encode(tokenizer, "a <image> </s> b")
    assert not set(tokens) & special_ids(tokenizer)
    assert decode(tokenizer, tokens) == "a <image> </s> b"


def test_an_image_token_the_vocabulary_lacks_is_added(byte_folder, plain_prompt):
    tokenizer = load_tokenizer(byte_folder, plain_prompt(image_token="<picture>"))
    assert tokenizer.image_id == len(tokenizer.hf) - 1
    tokens = tokenizer.encode("a<picture>b", add_special_tokens=False)
    assert tokens.count(tokenizer.image_id) == 1
    assert encode(tokenizer, "a<picture>b").count(tokenizer.image_id) == 0


def test_the_configs_end_tokens_end_answers_too(byte_folder, plain_prompt):
    tokenizer = load_tokenizer(byte_folder, plain_prompt(eos_token_ids=(0,)))
    assert tokenizer.hf.eos_token_ids == {0, 1}


def test_a_folder_with_our_config_loads_silently(any_folder, tmp_path, tiny_config):
    shutil.copytree(any_folder, tmp_path / "model")
    config = json.dumps(tiny_config.to_dict())
    (tmp_path / "model/config.json").write_text(config)
    code = (
        "import pathlib, sys\n"
        "from mm1_mlx.config import PromptConfig\n"
        "from mm1_mlx.tokenizer import load_tokenizer\n"
        "prompt = PromptConfig(template='plain', image_token_id=2)\n"
        "print(load_tokenizer(pathlib.Path(sys.argv[1]), prompt).image_id)"
    )
    run = subprocess.run(
        [sys.executable, "-W", "always::UserWarning", "-c", code, tmp_path / "model"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stderr == ""
    assert run.stdout.strip() in ("2", "3")


DAMAGED = {
    "empty": b"",
    "cut": None,
    "not_json": b"{{",
    "no_object": b"[]",
    "empty_object": b"{}",
    "no_model": b'{"version": "1.0", "model": {"type": "Surprise"}}',
    "bad_utf8": b"\xff\xfe\x00",
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_tokenizer_is_one_line(name, any_folder, tmp_path, plain_prompt):
    shutil.copytree(any_folder, tmp_path / "model")
    path = tmp_path / "model/tokenizer.json"
    content = DAMAGED[name]
    path.write_bytes(path.read_bytes()[:2000] if content is None else content)
    with pytest.raises(
        CheckpointError, match=r"model: the tokenizer cannot be loaded \(.*\); get its"
    ) as caught:
        load_tokenizer(tmp_path / "model", plain_prompt())
    assert "\n" not in str(caught.value)


def refusal(folder, config):
    """What is said about a folder's tokenizer, nothing where it loads."""
    try:
        load_tokenizer(folder, config)
    except CheckpointError as error:
        return str(error)
    return ""


def test_mutated_tokenizers_load_or_are_one_line(any_folder, tmp_path, plain_prompt):
    rng = random.Random(0)
    shutil.copytree(any_folder, tmp_path / "model")
    path = tmp_path / "model/tokenizer.json"
    good, refused = path.read_text(), 0
    for _ in range(40):
        content = json.loads(good)
        target = content
        while True:
            key = rng.choice(list(target))
            if not (
                isinstance(target[key], dict) and target[key] and rng.random() < 0.7
            ):
                break
            target = target[key]
        target[key] = rng.choice(
            [None, -1, 2**40, "", "x", [], {}, [[]], {"type": "x"}]
        )
        path.write_text(json.dumps(content))
        message = refusal(tmp_path / "model", plain_prompt())
        refused += bool(message)
        assert "\n" not in message
        assert len(message) < 500
    assert refused > 10


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer_class": "EvilTokenizer"},
        {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"},
        {"chat_template_type": "../../evil"},
        {"tool_parser_type": "evil"},
    ],
    ids=str,
)
def test_a_tokenizer_config_cannot_bring_code(
    change, byte_folder, tmp_path, plain_prompt
):
    shutil.copytree(byte_folder, tmp_path / "model")
    marker = tmp_path / "marker"
    (tmp_path / "model/evil.py").write_text(
        f"open({str(marker)!r}, 'w')\nclass Evil: ..."
    )
    path = tmp_path / "model/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert "\n" not in refusal(tmp_path / "model", plain_prompt())
    assert not marker.exists()


def test_a_folder_without_tokenizer_is_named(tmp_path, plain_prompt):
    with pytest.raises(CheckpointError, match="the tokenizer cannot be loaded"):
        load_tokenizer(tmp_path, plain_prompt())


def test_a_legacy_chat_template_file_is_read(byte_folder, tmp_path, plain_prompt):
    shutil.copytree(byte_folder, tmp_path / "model")
    template = "{{ messages[0]['content'] }}!"
    path = tmp_path / "model/chat_template.json"
    path.write_text(json.dumps({"chat_template": template}))
    tokenizer = load_tokenizer(tmp_path / "model", plain_prompt())
    assert tokenizer.hf.chat_template == template
    # A processor's template, written for pictures: it wins over a tokenizer's own.
    own = tmp_path / "model/tokenizer_config.json"
    own.write_text(json.dumps(json.loads(own.read_text()) | {"chat_template": "x"}))
    tokenizer = load_tokenizer(tmp_path / "model", plain_prompt())
    assert tokenizer.hf.chat_template == template
    path.write_text("[]")
    with pytest.raises(CheckpointError, match=r"chat_template.json holds no template"):
        load_tokenizer(tmp_path / "model", plain_prompt())


def test_a_special_cannot_form_across_texts(any_tokenizer):
    """A template may bring texts together: their ends are shielded too."""
    end = any_tokenizer.hf.convert_tokens_to_ids("</s>")
    for first, second in (("x <", "/s>"), ("x </", "s> y"), ("<ima ", "ge>")):
        for joined in (
            any_tokenizer.shield(first) + any_tokenizer.shield(second),
            any_tokenizer.shield(first).strip() + any_tokenizer.shield(second),
        ):
            tokens = any_tokenizer.encode(joined, add_special_tokens=False)
            assert end not in tokens
            assert any_tokenizer.image_id not in tokens
    text = "a < b and c </"
    tokens = any_tokenizer.encode(any_tokenizer.shield(text), add_special_tokens=False)
    assert any_tokenizer.hf.decode(tokens) == text
