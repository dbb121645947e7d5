"""A tokenizer and a chat template as what a program without Python does with a question.

What it could not do is refused by name: a prompt that is nearly right is worse than none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from mm1_mlx.config import MM1Config
from mm1_mlx.errors import CheckpointError
from mm1_mlx.messages import Part
from mm1_mlx.mlxfn.sidecar import (
    Layout,
    Piece,
    PromptSheet,
    Spelled,
    TokenizerSheet,
)
from mm1_mlx.prompt import encode_turns, render
from mm1_mlx.templates import MARKS
from mm1_mlx.tokenizer import Tokenizer

# tokenizers' ByteLevel, crates' pre_tokenizers/byte_level.rs: GPT-2's words.
GPT2_WORDS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)
# A place for the question that no template writes, and none completes.
QUESTION = "Qqq7Q"
SPACE = "▁"
# Metaspace's words, where it splits: each with the space before it.
METASPACE_WORDS = f"{SPACE}?[^{SPACE}]+|{SPACE}"


def prompt_sheet(config: MM1Config, tokenizer: Tokenizer) -> PromptSheet:
    """How the model's prompts are made, found by rendering one.

    Raises:
        CheckpointError: its template does something else with a question than to put it
            in a place, or strips it.
    """
    assert config.prompt is not None
    assert config.decoder is not None
    strip = _strips(config, tokenizer)
    letters = sorted({letter for text in tokenizer.specials for letter in text})
    template = config.prompt.template
    return PromptSheet(
        with_picture=_layout(True, config, tokenizer) if config.sees else None,
        without_picture=_layout(False, config, tokenizer),
        strip=strip,
        apart=template in MARKS,
        marks=MARKS.get(template, ()),
        specials=tuple(tokenizer.specials),
        spelled=tuple(
            Spelled(text=letter, tokens=tuple(tokenizer.spell(letter)))
            for letter in letters
        ),
        filler=config.prompt.image_token_id,
        image_tokens=config.num_image_tokens if config.sees else 0,
        eos=tuple(sorted(tokenizer.hf.eos_token_ids)),
        known=min(tokenizer.size, config.decoder.vocab_size),
    )


def _parts(picture: bool, question: str) -> list[tuple[str, list[Part]]]:
    return [("user", [None, question] if picture else [question])]


def _strips(config: MM1Config, tokenizer: Tokenizer) -> bool:
    """Whether the template strips a question; else it must keep it as it is."""
    assert config.prompt is not None
    plain, spaced = (
        render(_parts(config.sees, text), config.prompt, tokenizer)
        for text in (QUESTION, f"\n {QUESTION} \n")
    )
    if plain.count(QUESTION) != 1 or spaced not in (
        plain,
        plain.replace(QUESTION, f"\n {QUESTION} \n"),
    ):
        raise CheckpointError(
            "the model's chat template changes the question or repeats it, so a program "
            "without Python cannot write its prompts; give config.json a built-in "
            "prompt.template"
        )
    return spaced == plain


def _layout(picture: bool, config: MM1Config, tokenizer: Tokenizer) -> Layout:
    """The prompt of a question, with or without a picture."""
    assert config.prompt is not None
    turns = _parts(picture, QUESTION)
    text = render(turns, config.prompt, tokenizer)
    pieces = _pieces(text, tokenizer)
    if config.prompt.template in MARKS:
        bos = tokenizer.hf.bos_token_id
        apart = () if bos is None else (bos,)
        return Layout(begin=apart, pieces=pieces, end=())
    whole = encode_turns(turns, config.prompt, tokenizer)
    begin, end = _around(whole, tokenizer.encode(text, add_special_tokens=False))
    return Layout(begin=begin, pieces=pieces, end=end)


def _around(
    whole: Sequence[int], inner: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What stands before and behind some tokens within others."""
    for start in range(len(whole) - len(inner) + 1):
        stop = start + len(inner)
        if list(whole[start:stop]) == list(inner):
            return tuple(whole[:start]), tuple(whole[stop:])
    raise CheckpointError(
        "the model's tokenizer adds tokens within a prompt, so a program without Python "
        "cannot write it"
    )


def _pieces(text: str, tokenizer: Tokenizer) -> tuple[Piece, ...]:
    """A rendered prompt, cut at its special tokens, the picture and the question."""
    strippers = {
        str(token)
        for token in tokenizer.hf.added_tokens_decoder.values()
        if token.lstrip or token.rstrip or token.single_word
    }
    cuts = "|".join(map(re.escape, (*tokenizer.specials, QUESTION)))
    pieces = []
    for part in re.split(f"({cuts})", text):
        if part in strippers:
            raise CheckpointError(
                f"the model's special token {part!r} takes the spaces around it, which a "
                "program without Python does not do"
            )
        if part == QUESTION:
            pieces.append(Piece(kind="question"))
        elif part == tokenizer.image_token:
            pieces.append(Piece(kind="picture"))
        elif part in tokenizer.specials:
            token = tokenizer.hf.convert_tokens_to_ids(part)
            pieces.append(Piece(kind="tokens", tokens=(token,)))
        elif part:
            pieces.append(Piece(kind="text", text=part))
    return tuple(pieces)


def backend_json(tokenizer: Tokenizer) -> bytes:
    """The tokenizer as it is used, which its files may spell in another way."""
    return tokenizer.hf._tokenizer.backend_tokenizer.to_str(pretty=True).encode()


def tokenizer_sheet(tokenizer: Tokenizer) -> TokenizerSheet:
    """How text becomes tokens.

    Raises:
        CheckpointError: in a way that the sheet cannot say; names it.
    """
    content = json.loads(backend_json(tokenizer))
    model = content["model"]
    if model["type"] != "BPE":
        raise _unknown("model", model["type"])
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise _unknown(f"model.{name}", model[name])
    unknown = model.get("unk_token")
    shared: dict[str, Any] = {
        "ignore_merges": bool(model.get("ignore_merges")),
        "byte_fallback": bool(model.get("byte_fallback")),
        "unknown": None if unknown is None else model["vocab"].get(unknown),
        "fuse_unknown": bool(model.get("fuse_unk")),
    }
    detokenizer: Any = tokenizer.hf.detokenizer
    normalizer, before = content["normalizer"], content["pre_tokenizer"]
    _check_added(content)
    if (content["decoder"] or {}).get("type") == "ByteLevel":
        kind = _byte_level(normalizer, before)
        # mlx-lm leaves a first space out, without a switch.
        return TokenizerSheet(kind="byte_level", trim=True, **kind, **shared)
    if not hasattr(detokenizer, "trim_space"):
        raise _unknown("decoder", content["decoder"])
    kind = _sentencepiece(normalizer, before)
    trim = detokenizer.trim_space
    return TokenizerSheet(kind="sentencepiece", trim=trim, **kind, **shared)


def _byte_level(normalizer: Any, before: Any) -> dict[str, Any]:
    """What a tokenizer of bytes does before the merges."""
    if normalizer not in (None, {"type": "NFC"}):
        raise _unknown("normalizer", normalizer)
    steps = _steps(before, "pretokenizers")
    if not steps or steps[-1]["type"] != "ByteLevel":
        raise _unknown("pre_tokenizer", before)
    last = steps.pop()
    patterns = [_pattern(step) for step in steps]
    if last["use_regex"]:
        patterns.append(GPT2_WORDS)
    if last["add_prefix_space"] and steps:
        # It would go before every word.
        raise _unknown("pre_tokenizer", before)
    return {
        "patterns": tuple(patterns),
        "space_first": last["add_prefix_space"],
        "nfc": normalizer is not None,
    }


def _pattern(step: Any) -> str:
    """The expression that a step splits text by."""
    if step["type"] == "Digits":
        # Rust's char::is_numeric, crates' pre_tokenizers/digits.rs.
        return r"\p{N}" if step["individual_digits"] else r"\p{N}+"
    expression = step.get("pattern", {}).get("Regex")
    isolated = step.get("behavior") == "Isolated" and not step.get("invert")
    if step["type"] != "Split" or not isolated or not isinstance(expression, str):
        raise _unknown("pre_tokenizer", step)
    return expression


def _sentencepiece(normalizer: Any, before: Any) -> dict[str, Any]:
    """What a tokenizer of SentencePiece's kind does before the merges."""
    prepend = {"type": "Prepend", "prepend": SPACE}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    steps = _steps(normalizer, "normalizers")
    # Of a text whose spaces are written otherwise nothing is split.
    idle = {"type": "Split", "pattern": {"String": " "}}
    nothing = before is None or idle.items() <= before.items()
    if steps == [prepend, replace] and nothing:
        return {"prepend": "every"}
    if steps == [replace] and nothing:
        return {"prepend": "never"}
    if steps or before is None or before["type"] != "Metaspace":
        raise _unknown("normalizer and pre_tokenizer", [normalizer, before])
    if before["replacement"] != SPACE:
        raise _unknown("pre_tokenizer", before)
    return {
        "prepend": before["prepend_scheme"],
        "patterns": (METASPACE_WORDS,) if before["split"] else (),
    }


def _steps(part: Any, name: str) -> list[Any]:
    """The steps of a part of a tokenizer: several, one or none."""
    if part is None:
        return []
    return list(part[name]) if part["type"] == "Sequence" else [part]


def _check_added(content: Any) -> None:
    """Pass only if tokens that a question may hold are found as they are written."""
    for token in content["added_tokens"]:
        if token["special"]:
            continue
        ways = [way for way in ("single_word", "lstrip", "rstrip") if token[way]]
        kind = (content["normalizer"] or {"type": "NFC"})["type"]
        if token["normalized"] and kind != "NFC":
            ways.append("normalized")
        if ways:
            raise _unknown(f"added token {token['content']!r}", ways)


def _unknown(part: str, value: Any) -> CheckpointError:
    return CheckpointError(
        f"the model's tokenizer has a {part} of {json.dumps(value)[:120]}, which a "
        "program without Python cannot be told; byte-level and SentencePiece BPE can"
    )
