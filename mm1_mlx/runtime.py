"""From messages and pictures to an answer: ``load``, ``generate``, ``stream``.

The straight line of the package. A ``Runtime`` may be used from several threads: one
thread of its own runs the model, the others hand it work and wait.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

import mlx.core as mx
from mlx_lm.generate import TextStateMachine, generate_step
from mlx_lm.sample_utils import make_sampler
from mlx_lm.utils import maybe_set_recommended_wired_limit

from mm1_mlx import hub
from mm1_mlx.answer import (
    Answer,
    FinishReason,
    Options,
    Piece,
    Settings,
    Stats,
    Timings,
)
from mm1_mlx.checkpoint import device_dtype, foreign, load_config, load_model
from mm1_mlx.config import MODEL_TYPE, MM1Config
from mm1_mlx.errors import CheckpointError, PromptError
from mm1_mlx.files import user_path
from mm1_mlx.image import ImageSource
from mm1_mlx.messages import Message
from mm1_mlx.models import MM1
from mm1_mlx.prompt import Prompt
from mm1_mlx.resolution import with_resolution
from mm1_mlx.shots import choose_style, stops_of, with_shots
from mm1_mlx.tokenizer import Tokenizer, load_tokenizer
from mm1_mlx.worker import Worker

TINY = Path(__file__).with_name("tiny")
MODEL_VARIABLE = "MM1_MODEL"
# Below it the likeliest token is all but certain.
MIN_TEMPERATURE = 1e-6


@dataclass
class Runtime:
    """A loaded model and what it needs to answer; a context manager.

    Attributes:
        model: the MM1 module.
        tokenizer: its tokenizer.
        config: its config.
        path: the folder it came from.
    """

    model: MM1 = field(repr=False)
    tokenizer: Tokenizer
    config: MM1Config
    path: Path
    _worker: Worker = field(repr=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the model go; answers under way are finished first."""
        if self._worker.close():
            # Whoever keeps the closed runtime does not keep the weights.
            self.__dict__.pop("model", None)
            mx.clear_cache()


def load(
    source: str | Path | None = None,
    dtype: mx.Dtype | None = None,
    *,
    resolution: str | None = None,
) -> Runtime:
    """A model ready to answer.

    Args:
        source: a model folder, or a hub repository in this format; by default
            ``$MM1_MODEL``, else the embedded mm1-tiny.
        dtype: of the weights; as stored by default, and float32 on a CPU, whose half
            precision is slow.
        resolution: a mode of ``resolution.py`` in place of the model's own.

    Raises:
        CheckpointError: there is no such model, or it is damaged.
        ConfigError: its config.json does not describe a model, or has not the mode.
    """
    path = find_model(source)
    dtype = dtype or device_dtype()
    worker = Worker()
    try:
        return worker.submit(_load, path, dtype, resolution, worker).result()
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
            "(OWNER/NAME), or none for mm1-tiny"
        )
    # Asked first: a foreign checkpoint's gigabytes would be fetched in vain.
    if (kind := hub.model_type(name)) != MODEL_TYPE:
        raise foreign(name, kind)
    return hub.download(name)[0] if weights else hub.download_small(name)


def _load(
    path: Path, dtype: mx.Dtype | None, resolution: str | None, worker: Worker
) -> Runtime:
    config = load_config(path)
    prompt = config.prompt
    if config.decoder is None or prompt is None:
        raise CheckpointError(f"{path} has no decoder, so it cannot answer")
    if resolution is not None:
        config = with_resolution(config, resolution)
    model = load_model(path, dtype)
    model.config = config
    tokenizer = load_tokenizer(path, prompt, regions=config.region is not None)
    return Runtime(model, tokenizer, config, path, worker)


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
    return _consume(runtime, prompt, images, settings)


def generate(
    runtime: Runtime,
    prompt: str | Sequence[Message],
    images: Sequence[ImageSource] = (),
    **options: Unpack[Options],
) -> Answer:
    """The whole answer; arguments and errors as for ``stream``."""
    pieces = list(stream(runtime, prompt, images, **options))
    stats, reason = pieces[-1].stats, pieces[-1].finish_reason
    assert stats is not None
    assert reason is not None
    return Answer(
        text="".join(piece.text for piece in pieces),
        tokens=tuple(piece.token for piece in pieces if piece.token is not None),
        prompt_tokens=stats.prompt_tokens,
        image_tokens=stats.image_tokens,
        finish_reason=reason,
        timings=stats.timings,
    )


def _consume(
    runtime: Runtime,
    prompt: str | Sequence[Message],
    images: Sequence[ImageSource],
    settings: Settings,
) -> Iterator[Piece]:
    """Run the answer on the runtime's thread and hand its pieces over.

    A caller that stops listening ends the answer.
    """
    start = time.perf_counter()
    pieces: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()
    abandoned = threading.Event()

    def work() -> None:
        try:
            if abandoned.is_set():  # while other answers were under way
                return
            for piece in _answer(runtime, prompt, images, settings, start):
                pieces.put(piece)
                if abandoned.is_set():
                    break
        finally:
            pieces.put(None)

    job = runtime._worker.submit(work)
    try:
        while (piece := pieces.get()) is not None:
            yield piece
        job.result()
    finally:
        abandoned.set()


def _answer(
    runtime: Runtime,
    prompt: str | Sequence[Message],
    images: Sequence[ImageSource],
    settings: Settings,
    start: float,
) -> Iterator[Piece]:
    """The pieces of an answer that was asked for at ``start``."""
    began = time.perf_counter()
    if settings.shots:
        prompt, settings = _show(prompt, images, runtime.config, settings)
        images = ()
    built = Prompt.build(
        prompt, images, runtime.config, runtime.tokenizer, tiled=settings.tiled
    )
    max_tokens = _room(built, runtime.config, settings)
    embeddings = None
    if built.spans:
        image_tokens = runtime.model.encode(built.pictures)
        mx.eval(image_tokens)
        tokens = mx.array(built.tokens)
        embeddings = runtime.model.embed(tokens, image_tokens, built.spans)
    encode = time.perf_counter() - began
    if settings.seed is not None:
        mx.random.seed(settings.seed)
    steps = generate_step(
        mx.array(built.tokens),
        runtime.model,
        max_tokens=max_tokens,
        sampler=_sampler(settings),
        prompt_progress_callback=settings.progress,
        input_embeddings=embeddings,
    )
    times: list[float] = []
    ids = (_timed(int(token), times) for token, _ in steps)
    with _wired():
        for piece in _pieces(ids, runtime.tokenizer, settings):
            if piece.finish_reason is None:
                yield piece
            else:
                stats = _stats(built, start, encode, times)
                yield Piece(piece.text, piece.token, piece.finish_reason, stats)


def _show(
    prompt: str | Sequence[Message],
    images: Sequence[ImageSource],
    config: MM1Config,
    settings: Settings,
) -> tuple[list[Message], Settings]:
    """The conversation behind the examples, and where its answer ends."""
    assert config.prompt is not None
    style = choose_style(settings.shot_style, settings.shots, config.prompt)
    messages = with_shots(settings.shots, prompt, images, style)
    stop = settings.stop or stops_of(style, settings.shots)
    return messages, replace(settings, stop=stop)


@contextmanager
def _wired() -> Iterator[None]:
    """Keep the weights in memory meanwhile, where the device has a limit for it."""
    before = maybe_set_recommended_wired_limit()
    try:
        yield
    finally:
        if before is not None:
            mx.synchronize()
            mx.set_wired_limit(before)


def _room(prompt: Prompt, config: MM1Config, settings: Settings) -> int:
    """How many tokens may be generated before the context is full."""
    assert config.decoder is not None
    context = config.decoder.max_position_embeddings
    if len(prompt.tokens) >= context:
        raise PromptError(
            f"prompt has {len(prompt.tokens):,} tokens, {prompt.num_image_tokens:,} of "
            f"them pictures, but the model's context holds {context:,}; ask with fewer "
            "pictures or earlier turns"
        )
    return min(settings.max_tokens, context - len(prompt.tokens))


def _sampler(settings: Settings) -> Callable[[mx.array], mx.array]:
    greedy = settings.temperature < MIN_TEMPERATURE
    sample = make_sampler(0.0 if greedy else settings.temperature, settings.top_p)
    # In half precision small temperatures overflow.
    return lambda logprobs: sample(logprobs.astype(mx.float32))


def _timed(token: int, times: list[float]) -> int:
    times.append(time.perf_counter())
    return token


def _stats(
    prompt: Prompt, start: float, encode: float, tokens: Sequence[float]
) -> Stats:
    seconds = tokens[-1] - tokens[0]
    return Stats(
        prompt_tokens=len(prompt.tokens),
        image_tokens=prompt.num_image_tokens,
        generated_tokens=len(tokens),
        timings=Timings(
            encode=encode,
            first_token=tokens[0] - start,
            total=tokens[-1] - start,
            decode_rate=(len(tokens) - 1) / seconds if seconds else 0.0,
        ),
    )


def _pieces(
    ids: Iterator[int], tokenizer: Tokenizer, settings: Settings
) -> Iterator[Piece]:
    """Text of token ids, ended by an end token, a stop string or the caller."""
    detokenizer: Any = tokenizer.hf.detokenizer
    reason: FinishReason
    # Holds back text that may turn out to begin a stop string.
    machine = TextStateMachine({"normal": [(word, None) for word in settings.stop]})
    state = machine.make_state()
    # Not its last_segment: where the bytes of a second character are still incomplete,
    # the text becomes shorter for a while, and the first one would come twice.
    done = 0
    for token in ids:
        if token in tokenizer.hf.eos_token_ids:
            reason = "stop"
            break
        # Decoders are padded: their last tokens may have no text.
        if token < tokenizer.size:
            detokenizer.add_token(token)
        text = detokenizer.text[done:]
        done += len(text)
        state, text, name = machine.step(state, text)
        if name is None:
            yield Piece(text, token, "stop")
            return
        yield Piece(text, token)
        if settings.cancel is not None and settings.cancel.is_set():
            yield Piece(machine.flush(state)[1], None, "cancelled")
            return
    else:
        reason = "length"
    detokenizer.finalize()
    state, text, name = machine.step(state, detokenizer.text[done:])
    if name is not None:
        text += machine.flush(state)[1]
    else:
        reason = "stop"
    yield Piece(text, None, reason)
