"""From messages and pictures to an answer: ``load``, ``generate``, ``stream``.

The straight line of the package. A ``Runtime`` may be used from several threads: one
thread of its own runs the model, the others hand it work and wait.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import mlx.core as mx
from mlx_lm.utils import maybe_set_recommended_wired_limit

from mm1_mlx import hub
from mm1_mlx.adapters import Adapters, Named, load_adapted
from mm1_mlx.answer import Answer, Forecast, Options, Piece, Settings, join
from mm1_mlx.blas import give_back
from mm1_mlx.budget import allowed
from mm1_mlx.checkpoint import (
    Precision,
    device_dtype,
    foreign,
    load_config,
    read_manifest,
)
from mm1_mlx.config import MODEL_TYPE, MM1Config
from mm1_mlx.coreml.backend import CoreML
from mm1_mlx.engine import Engine
from mm1_mlx.errors import CheckpointError, ConfigError
from mm1_mlx.folders import user_path
from mm1_mlx.image import ImageSource
from mm1_mlx.memory.features import FeatureCache, fingerprint
from mm1_mlx.memory.named import NamedPrefixes, Prefix
from mm1_mlx.memory.prefixes import PrefixCache
from mm1_mlx.messages import Message
from mm1_mlx.models import MM1
from mm1_mlx.request import answer
from mm1_mlx.resolution import with_resolution
from mm1_mlx.tokenizer import Tokenizer, load_tokenizer
from mm1_mlx.worker import Worker

T = TypeVar("T")

TINY = Path(__file__).with_name("tiny")
MODEL_VARIABLE = "MM1_MODEL"
FEATURES_VARIABLE = "MM1_FEATURES"
# Of prompts' caches beside the one used last: four of 2,000 tokens for a 3B model.
PREFIX_BYTES = 2 << 30
# And no more of what is free once the weights are there.
PREFIX_SHARE = 0.125


@dataclass
class Runtime:
    """A loaded model and what it needs to answer; a context manager.

    Attributes:
        engine: the model, its tokenizer and config, and what is kept of answers.
        path: the folder it came from.
        digest: tells its weights, config and adapters from those of others.
        adapters: the names of those and their scales.
    """

    engine: Engine = field(repr=False)
    path: Path
    digest: str
    adapters: tuple[tuple[str, float], ...]
    _worker: Worker = field(repr=False)

    @property
    def model(self) -> MM1:
        """The MM1 module."""
        return self.engine.model

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.engine.tokenizer

    @property
    def config(self) -> MM1Config:
        """The model's config."""
        return self.engine.config

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def run(self, make: Callable[[threading.Event], Iterator[T]]) -> Iterator[T]:
        """What an iterator made on the model's thread gives, as it comes.

        For what is not asked through ``stream``: its code may use ``engine``. It is given
        an event that is set when nobody listens any more.
        """
        return self._worker.iterate(make)

    def save_prefix(
        self, prefix: Prefix, progress: Callable[[int, int], None] | None = None
    ) -> int:
        """Keep a prefix of prompts on disk; how many positions it has.

        ``stream(..., prefix=NAME)`` answers behind it, in this process and in others.

        Args:
            prefix: its name, system message, pictures and examples.
            progress: called with positions read and in all.

        Raises:
            PromptError: it is empty, or does not fit the model.
        """
        return self._worker.submit(self.engine.save_prefix, prefix, progress).result()

    def forget(self) -> None:
        """Let go of what is kept in memory of earlier pictures and prompts."""
        self._worker.submit(self.engine.forget).result()

    def close(self) -> None:
        """Let the model go; answers under way are finished first."""
        if self._worker.close():
            # Whoever keeps the closed runtime does not keep the weights.
            self.__dict__.pop("engine", None)
            mx.clear_cache()
            give_back()


def load(
    source: str | Path | None = None,
    dtype: mx.Dtype | None = None,
    *,
    resolution: str | None = None,
    features: str | Path | None = None,
    group: mx.distributed.Group | None = None,
    adapters: Sequence[Named] = (),
    vision_backend: str | CoreML = "mlx",
) -> Runtime:
    """A model ready to answer.

    Args:
        source: a model folder, or a hub repository in this format; by default
            ``$MM1_MODEL``, else the embedded mm1-tiny.
        dtype: of the weights; by default as stored where the device computes that
            quickly, else float32 on a CPU, float16 on M1 and M2, bfloat16 from M3.
        resolution: a mode of ``resolution.py`` in place of the model's own, or of the
            one that the adapters were trained at.
        features: a folder where pictures' image tokens are kept for other processes; by
            default ``$MM1_FEATURES``, else in memory only.
        group: the processes of ``mlx.launch`` that share the model; each is asked the
            same and gives the same answers.
        adapters: folders or hub repositories of adapters that change it, each alone or
            with the share of its change that is taken, ``("pirate", 0.5)``.
        vision_backend: what computes image tokens: ``mlx``; on macOS ``coreml``, for the
            package ``Encoder.mlpackage`` in the model's folder, or ``coreml:PACKAGE``.

    Raises:
        CheckpointError: there is no such model or adapter, it is damaged, or they do not
            fit together, or a package was made from another one.
        ConfigError: its config.json does not describe a model, or has not the mode; or
            there is no such backend here.
    """
    if isinstance(vision_backend, str):
        backend = CoreML.named(vision_backend)
    else:
        backend = vision_backend
    path = find_model(source)
    worker = Worker()
    try:
        return worker.submit(
            _load,
            path,
            dtype or device_dtype,
            resolution,
            _feature_folder(features),
            group,
            adapters,
            backend,
            worker,
        ).result()
    except BaseException:
        worker.close()
        raise


def find_model(source: str | Path | None = None, *, weights: bool = True) -> Path:
    """The folder of a model named as ``load`` takes it.

    Of a hub repository, without ``weights``, one that holds its small files alone.

    Raises:
        CheckpointError: there is no such folder and no such hub repository.
    """
    name = str(source or os.environ.get(MODEL_VARIABLE) or TINY)
    path = user_path(name)
    if path.is_dir():
        return path
    if path.is_file():
        raise CheckpointError(f"model {name!r} is a file; give the folder it lies in")
    if not hub.is_repository(name):
        raise CheckpointError(
            f"model folder {name!r} does not exist; give a folder or a repository "
            f"(OWNER/NAME), or that of mm1-tiny, {str(TINY)!r}"
        )
    # Asked first: a foreign checkpoint's gigabytes would be fetched in vain.
    if (kind := hub.model_type(name)) != MODEL_TYPE:
        raise foreign(name, kind)
    return hub.download(name)[0] if weights else hub.download_small(name)


def config_of(path: Path, resolution: str | None = None) -> MM1Config:
    """The config of a model folder that can answer, in a mode of ``resolution.py``.

    Raises:
        CheckpointError: it describes no model that answers.
        ConfigError: it describes none, or has not the mode.
    """
    config = load_config(path)
    if config.decoder is None or config.prompt is None:
        raise CheckpointError(f"{path} has no decoder, so it cannot answer")
    return with_resolution(config, resolution) if resolution else config


def _feature_folder(folder: str | Path | None) -> Path | None:
    name = folder or os.environ.get(FEATURES_VARIABLE)
    return user_path(str(name)) if name else None


def _load(
    path: Path,
    dtype: Precision,
    resolution: str | None,
    features: Path | None,
    group: mx.distributed.Group | None,
    adapters: Sequence[Named],
    backend: CoreML | None,
    worker: Worker,
) -> Runtime:
    changes = Adapters.load(adapters)
    config = config_of(path, changes.resolution(resolution))
    assert config.prompt is not None
    elsewhere = _attached(backend, path, config, changes)
    model = load_adapted(path, changes, dtype, group)
    model.config = config
    if backend is not None:
        # Nobody computes with its weights.
        model.pop("vision", None)
        mx.clear_cache()
    tokenizer = load_tokenizer(path, config.prompt, regions=config.region is not None)
    kind = model.decoder.norm.weight.dtype
    size = group.size() if group else 1
    # A part of the heads is no cache for another number of processes, nor is anything of
    # a model without its adapters.
    decides = [config.to_dict(), size, *changes.identity, *elsewhere]
    model_print = fingerprint(read_manifest(path)["files"], decides, kind)
    room = allowed()
    most = PREFIX_BYTES if room is None else int(room * PREFIX_SHARE)
    prefixes = PrefixCache(min(PREFIX_BYTES, most))
    engine = Engine(
        model=model,
        tokenizer=tokenizer,
        config=config,
        features=FeatureCache(
            partial(model.encode, image_tokens=backend), model_print, features
        ),
        prefixes=prefixes,
        named=NamedPrefixes(str(path.absolute()), model_print, prefixes),
        group=group,
    )
    named = tuple((adapter.name, scale) for adapter, scale in changes.given)
    return Runtime(engine, path, model_print, named, worker)


def _attached(
    backend: CoreML | None, path: Path, config: MM1Config, changes: Adapters
) -> list[Any]:
    """What tells a backend's image tokens from those of mlx, once it is the model's."""
    if backend is None:
        return []
    if changes.given:
        raise ConfigError(
            "a Core ML package knows nothing of adapters; fuse them with 'mm1 fuse' and "
            "export the fused model, or answer with --vision-backend mlx"
        )
    return backend.attach(path, config.image)


def stream(
    runtime: Runtime,
    prompt: str | Sequence[Message],
    images: Sequence[ImageSource] = (),
    **options: Unpack[Options],
) -> Iterator[Piece]:
    """The answer, piece by piece as it is written.

    Args:
        runtime: from ``load``.
        prompt: a question, or chat messages with images in place.
        images: paths, bytes, data URIs or PIL images.
        options: fields of ``Settings``.

    Raises:
        PromptError: prompt, pictures and model do not fit together.
    """
    settings = Settings(**options)
    start = time.perf_counter()
    return runtime.run(
        lambda gone: _answer(runtime, prompt, images, settings, start, gone)
    )


async def astream(
    runtime: Runtime,
    prompt: str | Sequence[Message],
    images: Sequence[ImageSource] = (),
    **options: Unpack[Options],
) -> AsyncGenerator[Piece]:
    """The answer, piece by piece, for asyncio; arguments and errors as for ``stream``."""
    settings = Settings(**options)
    start = time.perf_counter()
    pieces = runtime._worker.aiterate(
        lambda gone: _answer(runtime, prompt, images, settings, start, gone)
    )
    async with aclosing(pieces):
        async for piece in pieces:
            yield piece


def generate(
    runtime: Runtime,
    prompt: str | Sequence[Message],
    images: Sequence[ImageSource] = (),
    **options: Unpack[Options],
) -> Answer:
    """The whole answer; arguments and errors as for ``stream``."""
    return join(list(stream(runtime, prompt, images, **options)))


def forecast(
    runtime: Runtime,
    prompt: str | Sequence[Message],
    images: Sequence[ImageSource] = (),
    **options: Unpack[Options],
) -> Forecast:
    """What an answer will take of tokens, memory and time; arguments as for ``stream``.

    Pictures are opened, and nothing is run. What will not fit is no error here.
    """
    settings = Settings(**options)

    def work() -> Forecast:
        with runtime.engine.lock:
            return runtime.engine.forecast(prompt, images, settings)

    return runtime._worker.submit(work).result()


def _answer(
    runtime: Runtime,
    prompt: str | Sequence[Message],
    images: Sequence[ImageSource],
    settings: Settings,
    start: float,
    gone: threading.Event,
) -> Iterator[Piece]:
    """The pieces of an answer that was asked for at ``start``."""
    engine = runtime.engine
    with engine.lock, wired():
        plan = engine.plan(prompt, images, settings)
        request = engine.open(plan, start, gone=gone)
        with closing(answer(request)) as pieces:
            yield from pieces


class _Wired:
    """The weights kept in memory while anybody answers, where the device has a limit.

    The limit is the process's: the first who answers sets it, the last one resets it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before: int | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._before = maybe_set_recommended_wired_limit()
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0 and self._before is not None:
                    mx.synchronize()
                    mx.set_wired_limit(self._before)


wired = _Wired()
