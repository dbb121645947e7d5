"""A hub repository: its size and licence, and a local copy of its data files."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, ModelInfo, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from mm1_mlx.errors import CheckpointError
from mm1_mlx.files import PLAIN_NAME, read_json

T = TypeVar("T")

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

# Never *.py: code that comes with a model is not run, so it is not fetched.
SMALL = ("*.json", "*.jinja", "*.txt", "tokenizer.model")
# The same weights in another layout: Mistral's and OpenCLIP's own.
SECOND_COPIES = ("consolidated", "open_clip")
# What open_clip calls its weights, the better kind first.
OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)


@dataclass(frozen=True)
class SourceInfo:
    """What to tell a user before a source is used."""

    name: str
    # None where it is not known.
    bytes: int | None
    licence: str | None


def is_repository(name: str) -> bool:
    """Whether ``name`` is spelled like ``owner/name``."""
    if REPOSITORY.fullmatch(name) is None:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def describe(repository: str, folders: Sequence[str] = ()) -> SourceInfo:
    """Name, size of the weights in bytes and licence, from the model card.

    Nothing but the name where the hub cannot be asked: there may be a local copy.

    Args:
        repository: its name.
        folders: those in it whose weights count, too, if all of them are there.

    Raises:
        CheckpointError: there is no such repository.
    """
    info = _ask(repository, files_metadata=True)
    if info is None:
        return SourceInfo(repository, None, None)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    if not all(_inside(info, folder) for folder in folders):
        folders = ()
    size = sum(sizes[name] for name in _weights(info, folders))
    return SourceInfo(repository, size, _licence(info))


def model_type(repository: str) -> str | None:
    """What the repository's config.json calls its model, read alone.

    Raises:
        CheckpointError: there is no such repository, or it cannot be reached.
    """
    path = _reach(repository, lambda: _config_file(repository))
    values = read_json(Path(path))
    return values.get("model_type") if isinstance(values, dict) else None


def _config_file(repository: str) -> str:
    try:
        return hf_hub_download(repository, "config.json")
    except RemoteEntryNotFoundError as error:
        try:  # its only config in some repositories of open_clip
            return hf_hub_download(repository, "open_clip_config.json")
        except RemoteEntryNotFoundError:
            raise error from None


def download(
    repository: str, *, pickles: bool = False, folders: Sequence[str] = ()
) -> tuple[Path, str | None]:
    """The folder with the repository's configs, tokenizer and weights, and its licence.

    Without a network a complete earlier download is used.

    Args:
        repository: its name.
        pickles: whether weights that only exist as pickles can be read.
        folders: those in it of which the same is fetched.

    Raises:
        CheckpointError: there is no such repository, or it cannot be reached.
    """
    info = _ask(repository)
    if info is None:
        folder = _reach(repository, lambda: _snapshot(repository, None, list(SMALL)))
        if not _own(path.name for path in folder.iterdir()):
            raise _refusal(repository)
        return folder, None
    weights = _weights(info)
    nested = _weights(info, folders)[len(weights) :]
    # Safetensors come first, wherever they lie.
    if any(name.endswith(".bin") for name in (*weights, *nested)) and not pickles:
        raise CheckpointError(
            f"{repository} has only .bin weights, which need torch to be converted: "
            'pip install "mm1-mlx[torch]"'
        )
    patterns = [*SMALL, *weights]
    nested += _small_inside(info, folders)
    folder = _reach(
        repository, lambda: _snapshot(repository, info.sha, patterns, nested)
    )
    return folder, _licence(info)


def download_small(repository: str, folders: Sequence[str] = ()) -> Path:
    """The folder with the repository's files but the weights.

    Args:
        repository: its name.
        folders: those in it of which the same is fetched.

    Raises:
        CheckpointError: there is no such repository, or it cannot be reached.
    """
    info = _ask(repository)
    revision, nested = (info.sha, _small_inside(info, folders)) if info else (None, [])
    return _reach(
        repository, lambda: _snapshot(repository, revision, list(SMALL), nested)
    )


def download_files(repository: str, names: Sequence[str]) -> Path:
    """The folder with these files of a repository alone, as far as it has them.

    Raises:
        CheckpointError: there is no such repository, or it cannot be reached.
    """
    info = _ask(repository)
    revision = info.sha if info else None
    return _reach(repository, lambda: _snapshot(repository, revision, list(names)))


def _ask(repository: str, *, files_metadata: bool = False) -> ModelInfo | None:
    """What the hub says of a repository; None where it cannot be asked.

    Raises:
        CheckpointError: there is no such repository.
    """
    try:
        return HfApi().model_info(repository, files_metadata=files_metadata)
    except RepositoryNotFoundError as error:
        raise _refusal(repository, error) from None
    except (HTTPError, OfflineModeIsEnabled):
        return None


def _snapshot(
    repository: str,
    revision: str | None,
    patterns: list[str],
    nested: Sequence[str] = (),
) -> Path:
    """A local copy of the files that match, and of those that lie in folders by name."""
    folder = snapshot_download(
        repository,
        revision=revision,
        allow_patterns=patterns,
        ignore_patterns=["*/*"],
        local_files_only=revision is None,
    )
    if nested:
        # By themselves: a pattern's star would match a slash, too.
        snapshot_download(repository, revision=revision, allow_patterns=list(nested))
    return Path(folder)


def _weights(info: ModelInfo, folders: Sequence[str] = ()) -> list[str]:
    """The weight files of a repository, its own first, then those of folders in it."""
    names = _own(_inside(info, ""))
    for folder in folders:
        names += [f"{folder}/{name}" for name in _own(_inside(info, folder))]
    return names


def _small_inside(info: ModelInfo, folders: Sequence[str]) -> list[str]:
    return [
        f"{folder}/{name}"
        for folder in folders
        for name in _inside(info, folder)
        if any(fnmatch(name, pattern) for pattern in SMALL)
    ]


def _inside(info: ModelInfo, folder: str) -> list[str]:
    """The plain names of the files directly in a folder of a repository."""
    files = (file.rfilename.rpartition("/") for file in info.siblings or ())
    return [x for place, _, x in files if place == folder and PLAIN_NAME.fullmatch(x)]


def _own(names: Iterable[str]) -> list[str]:
    """A repository's own weight files of all its files, without second copies of them."""
    names = list(names)
    safetensors = [
        name
        for name in names
        if name.endswith(".safetensors") and not name.startswith(SECOND_COPIES)
    ]
    pickles = [
        name
        for name in names
        if name.startswith("pytorch_model") and name.endswith(".bin")
    ]
    return safetensors or pickles or open_clip_weights(names)


def open_clip_weights(names: Iterable[str]) -> list[str]:
    """The one file of open_clip's weights among these, to use where there are no others."""
    names = set(names)
    return next(([name] for name in OPEN_CLIP_WEIGHTS if name in names), [])


def _licence(info: ModelInfo) -> str | None:
    licence = info.card_data.get("license") if info.card_data else None
    return str(licence) if licence else None


def _reach(repository: str, call: Callable[[], T]) -> T:
    try:
        return call()
    except (HTTPError, OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise _refusal(repository, error) from None


def _refusal(repository: str, error: Exception | None = None) -> CheckpointError:
    if isinstance(error, GatedRepoError):
        return CheckpointError(
            f"{repository} is gated; accept its licence at "
            f"https://huggingface.co/{repository} and run 'hf auth login'"
        )
    if isinstance(error, RepositoryNotFoundError):
        return CheckpointError(
            f"{repository!r} is neither a folder here nor a repository on the hub; check "
            "the name, or run 'hf auth login' if it is private"
        )
    if isinstance(error, RemoteEntryNotFoundError):
        return CheckpointError(
            f"{repository} has no config.json; give the repository of a Hugging Face "
            "checkpoint"
        )
    return CheckpointError(
        f"{repository} cannot be reached on the hub and is not in its local cache; check "
        "the network, or give a local folder"
    )
