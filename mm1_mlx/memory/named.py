"""Prefixes of prompts by name: kept on disk, read back by another process.

A folder each: ``prefix.json`` says what stands before a prompt and at which positions,
``cache.safetensors`` holds the keys and values there, and the pictures lie beside it as
they were given, so that the prompt can be built again and compared.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mm1_mlx.answer import Settings
from mm1_mlx.caches.quantized import KVCache
from mm1_mlx.errors import CheckpointError, PromptError
from mm1_mlx.files import PLAIN_NAME, fsync, read_json, read_shard, safe_join
from mm1_mlx.folders import cache_folder
from mm1_mlx.image import DEFAULT_LIMITS, ImageSource, encoded, name_of
from mm1_mlx.layout import Span
from mm1_mlx.memory.prefixes import KVPrecision, Position, PrefixCache, common, pack
from mm1_mlx.messages import Message
from mm1_mlx.prompt import Prompt
from mm1_mlx.shots import Shot, with_shots

FORMAT_VERSION = 1
RECORD = "prefix.json"
CACHE = "cache.safetensors"


@dataclass(frozen=True)
class Prefix:
    """What stands before a prompt.

    Attributes:
        name: its name.
        system: the system message.
        images: pictures before the question's own.
        shots: solved examples.
        shot_style: how they are shown.
    """

    name: str
    system: str | None = None
    images: tuple[ImageSource, ...] = ()
    shots: tuple[Shot, ...] = ()
    shot_style: str = "auto"

    def before(
        self,
        prompt: str | Sequence[Message],
        images: Sequence[ImageSource],
        settings: Settings,
    ) -> tuple[list[Message], tuple[ImageSource, ...], Settings]:
        """The prompt behind this prefix: messages with their pictures, and settings.

        Raises:
            PromptError: both have a system message, or examples.
        """
        messages = [{**m} for m in with_shots((), prompt, images, "chat")]
        if self.images:
            _show(self.images, messages)
        if self.system is not None:
            if any(message["role"] == "system" for message in messages):
                raise PromptError(
                    f"prefix {self.name!r} has a system message, and so has the prompt; "
                    "leave one out"
                )
            messages.insert(0, {"role": "system", "content": self.system})
        if self.shots:
            if settings.shots:
                raise PromptError(
                    f"prefix {self.name!r} has examples, and so has the prompt; leave "
                    "them out"
                )
            settings = replace(settings, shots=self.shots, shot_style=self.shot_style)
        return [*messages], (), settings


class NamedPrefixes:
    """The prefixes of one folder, as one model may use them.

    Args:
        model: the model's name, for people.
        fingerprint: of the model, its config and its precision.
        prefixes: where their caches are kept in memory.
        folder: where they lie; by default in the user's cache folder.
    """

    def __init__(
        self,
        model: str,
        fingerprint: str,
        prefixes: PrefixCache,
        folder: Path | None = None,
    ) -> None:
        self.folder = folder or prefix_folder()
        self._model = model
        self._fingerprint = fingerprint
        self._prefixes = prefixes
        self._found: dict[str, tuple[Prefix, tuple[Position, ...]]] = {}

    def find(self, name: str) -> Prefix:
        """The prefix of that name.

        Raises:
            PromptError: there is none, or it was saved for another model.
        """
        place = _place(self.folder, name)
        if not place.is_dir():
            known = ", ".join(sorted(names(self.folder))[:8]) or "none"
            raise PromptError(
                f"there is no prefix {name!r}, known: {known}; save it first with "
                f"'mm1 prefix save {name}'"
            )
        record = _read_record(place)
        if record["fingerprint"] != self._fingerprint:
            # The end of a path says more than its beginning.
            then, now = record["model"][-80:], self._model[-80:]
            others = (
                "that model in another version, precision or resolution, or with other "
                "adapters"
            )
            if record["model"] != self._model:
                others = f"{then!r}"
            raise PromptError(
                f"prefix {name!r} was saved for {others}, and asked of {now!r}; save it "
                "again, or ask the model that it was saved for"
            )
        prefix = Prefix(
            name,
            record["system"],
            tuple(safe_join(place, image) for image in record["images"]),
            tuple(_shot(values, place) for values in record["shots"]),
            record["shot_style"],
        )
        self._found[name] = prefix, _positions(record)
        return prefix

    def recall(
        self, prefix: Prefix, positions: Sequence[Position], precision: KVPrecision
    ) -> None:
        """Have the prefix's cache in memory, if more of it is of use than is there.

        Args:
            prefix: from ``find``.
            positions: of the prompt that begins with it.
            precision: how its cache is to hold keys and values.
        """
        saved = self._found[prefix.name][1]
        useful = common(saved, positions)
        if useful > self._prefixes.longest(positions, precision):
            cache = _read_cache(_place(self.folder, prefix.name), len(saved))
            pack(cache, precision)
            self._prefixes.keep(saved, cache, precision)

    def save(self, prefix: Prefix, prompt: Prompt, cache: list[Any]) -> Path:
        """Write a prefix, in place of one of the same name; its folder.

        Args:
            prefix: what stands there.
            prompt: its positions.
            cache: the keys and values of exactly these.
        """
        place = _place(self.folder, prefix.name)
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(f".{glob.escape(place.name)}.*"):
            # Of a run that was killed.
            shutil.rmtree(left, ignore_errors=True)
        partial = place.with_name(f".{place.name}.partial-{os.getpid()}")
        old = place.with_name(f".{place.name}.old-{os.getpid()}")
        partial.mkdir()
        try:
            record = {
                "format_version": FORMAT_VERSION,
                "fingerprint": self._fingerprint,
                "model": self._model,
                "system": prefix.system,
                "images": [*_write_pictures(prefix.images, partial, "image")],
                "shots": [
                    _shot_record(shot, partial, i)
                    for i, shot in enumerate(prefix.shots)
                ],
                "shot_style": prefix.shot_style,
                "tokens": prompt.tokens,
                "spans": [
                    [span.start, span.length, span.digest, span.offset]
                    for span in prompt.spans
                ],
            }
            tensors: dict[str, mx.array] = {}
            for i, layer in enumerate(cache):
                keys, values = layer.keys_and_values()
                tensors |= {f"{i}.keys": keys, f"{i}.values": values}
            mx.save_safetensors(str(partial / CACHE), tensors)
            (partial / RECORD).write_text(json.dumps(record))
            for path in partial.iterdir():
                fsync(path)
            if place.exists():
                place.rename(old)
            partial.rename(place)
        except RuntimeError as error:
            raise PromptError(
                f"{str(place)!r} cannot be written ({error}); is the disk full?"
            ) from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
        return place


@dataclass(frozen=True)
class Saved:
    """What a list of prefixes says of one; of a damaged one ``model`` is empty."""

    name: str
    model: str
    tokens: int
    pictures: int
    bytes: int


def prefix_folder() -> Path:
    """Where the user's prefixes lie."""
    return cache_folder() / "prefixes"


def names(folder: Path) -> list[str]:
    """The names of a folder's prefixes."""
    if not folder.is_dir():
        return []
    return sorted(
        path.name
        for path in folder.iterdir()
        if PLAIN_NAME.fullmatch(path.name) and (path / RECORD).is_file()
    )


def saved(folder: Path) -> list[Saved]:
    """Every prefix of a folder; of one that cannot be read its name and size."""
    return [_saved(folder / name) for name in names(folder)]


def drop(folder: Path, name: str) -> None:
    """Delete a prefix.

    Raises:
        PromptError: there is none of that name.
    """
    place = _place(folder, name)
    if not (place / RECORD).is_file():
        raise PromptError(f"there is no prefix {name!r}")
    shutil.rmtree(place)


def _saved(place: Path) -> Saved:
    size = sum(path.stat().st_size for path in place.iterdir())
    try:
        record = _read_record(place)
    except PromptError:
        return Saved(place.name, "", 0, 0, size)
    digests = {digest for _, _, digest, _ in record["spans"]}
    tokens = len(record["tokens"])
    return Saved(place.name, record["model"], tokens, len(digests), size)


def _place(folder: Path, name: str) -> Path:
    if not PLAIN_NAME.fullmatch(name):
        raise PromptError(
            f"prefix name {name!r:.80} is not allowed; use letters, digits, - and _"
        )
    return folder / name


def _read_record(place: Path) -> dict[str, Any]:
    """What is written about a prefix.

    Raises:
        PromptError: it cannot be read.
    """
    try:
        record = read_json(place / RECORD)
    except CheckpointError:
        record = None
    version = record.get("format_version") if isinstance(record, dict) else None
    if isinstance(record, dict) and version == FORMAT_VERSION and _is_whole(record):
        return record
    raise PromptError(
        f"prefix {place.name!r} is damaged or of another version; save it again, or "
        f"'mm1 prefix drop {place.name}'"
    )


def _is_whole(record: Mapping[str, Any]) -> bool:
    """Whether every field is there and of its type."""
    texts = ("fingerprint", "model", "shot_style")
    lists = ("images", "shots", "tokens", "spans")
    return (
        all(isinstance(record.get(name), str) for name in texts)
        and all(isinstance(record.get(name), list) for name in lists)
        and isinstance(record.get("system"), str | None)
        and all(isinstance(token, int) for token in record["tokens"])
        and all(_is_span(span, len(record["tokens"])) for span in record["spans"])
        and all(isinstance(name, str) for name in record["images"])
        and all(_is_shot(shot) for shot in record["shots"])
    )


def _is_span(span: Any, length: int) -> bool:
    if not (isinstance(span, list) and [type(x) for x in span] == [int, int, str, int]):
        return False
    start, count, _, offset = span
    return 0 <= start < start + count <= length and offset >= 0


def _is_shot(shot: Any) -> bool:
    return (
        isinstance(shot, dict)
        and isinstance(shot.get("answer"), str)
        and all(isinstance(shot.get(x), str | None) for x in ("question", "reasoning"))
        and isinstance(shot.get("images"), list)
        and all(isinstance(name, str) for name in shot["images"])
    )


def _positions(record: Mapping[str, Any]) -> tuple[Position, ...]:
    spans = tuple(
        Span(start, length, "picture", 0, digest, offset)
        for start, length, digest, offset in record["spans"]
    )
    return Prompt(tuple(record["tokens"]), spans).positions


def _read_cache(place: Path, length: int) -> list[Any]:
    tensors = read_shard(place / CACHE)
    layers = []
    for i in range(len(tensors) // 2):
        keys, values = tensors.get(f"{i}.keys"), tensors.get(f"{i}.values")
        if keys is None or values is None or keys.shape[2] != length:
            raise CheckpointError(
                f"{place / CACHE} and {RECORD} do not belong together; save the prefix "
                "again"
            )
        layers.append(KVCache.from_state((keys, values, length)))
    mx.eval([layer.state for layer in layers])
    return layers


def _show(images: Sequence[ImageSource], messages: list[dict[str, Any]]) -> None:
    """Put pictures before those of the first user message; regions keep theirs."""
    for message in messages:
        message["content"] = [
            {**part, "picture": part["picture"] + len(images)}
            if part["type"] == "region"
            else part
            for part in message["content"]
        ]
    first = next(message for message in messages if message["role"] == "user")
    shown = [{"type": "image", "image": image} for image in images]
    first["content"] = [*shown, *first["content"]]


def _write_pictures(
    images: Sequence[ImageSource], folder: Path, stem: str
) -> Iterator[str]:
    for i, image in enumerate(images):
        name = f"{stem}-{i}"
        data = encoded(image, name_of(image, i + 1), DEFAULT_LIMITS)
        (folder / name).write_bytes(data)
        yield name


def _shot_record(shot: Shot, folder: Path, number: int) -> dict[str, Any]:
    return {
        "images": [*_write_pictures(shot.images, folder, f"shot-{number}")],
        "question": shot.question,
        "answer": shot.answer,
        "reasoning": shot.reasoning,
    }


def _shot(values: Mapping[str, Any], place: Path) -> Shot:
    images = tuple(safe_join(place, name) for name in values["images"])
    return Shot(images, values["answer"], values["question"], values["reasoning"])
