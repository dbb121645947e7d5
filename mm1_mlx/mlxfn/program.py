"""A folder of exported functions as a program: checked, opened, and asked.

What ``apps/macos/mlxfn-demo`` does in C++, for tests, and for the check of an export. The
sidecar and the files' digests are checked before mlx reads a byte of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mm1_mlx.errors import CheckpointError, ConfigError, PromptError
from mm1_mlx.files import read_json, safe_join, sha256
from mm1_mlx.mlxfn.sidecar import (
    FORMAT,
    FORMAT_VERSION,
    SIDECAR,
    Array,
    Function,
    Sidecar,
)
from mm1_mlx.prompt import Prompt

# What C++ calls mlx::core::version(); the stubs lack it.
MLX: str = mx.__version__  # type: ignore[attr-defined]
AGAIN = "export the model again"


@dataclass
class State:
    """Keys and values of every layer, by turns, and how many positions they hold."""

    caches: list[mx.array]
    offset: int = 0


@dataclass(frozen=True)
class Program:
    """The functions of a folder and what its sidecar says of them."""

    folder: Path
    sidecar: Sidecar
    files: dict[str, Any]

    def encode(self, pixels: mx.array) -> mx.array:
        """Image tokens [K, D] of a picture's pixels [1, S, S, 3], of mean 0."""
        if self.sidecar.image is None:
            raise PromptError("the model takes text only; ask without pictures")
        (tokens,) = self._call(self.sidecar.find("encode"), [pixels])
        return tokens

    def start(self) -> State:
        """A cache that holds nothing."""
        return State([_zeros(x) for x in self.sidecar.find("run").inputs[3:]])

    def logits(self, prompt: Prompt, state: State) -> mx.array:
        """Logits [1, V] behind a prompt that goes on from a state, which holds it then.

        Raises:
            PromptError: it is empty or longer than there is room.
        """
        tokens, capacity = prompt.tokens, self.sidecar.capacity
        if not tokens:
            raise PromptError("the prompt is empty; ask something")
        if state.offset + len(tokens) > capacity:
            raise PromptError(
                f"the prompt has {state.offset + len(tokens):,} tokens, more than the "
                f"{capacity:,} that the functions hold; export with a larger --capacity"
            )
        pictures = [
            self.encode(mx.array(picture.tiles[0])[None]) for picture in prompt.pictures
        ]
        logits, done = None, 0
        while done < len(tokens):
            T = self._bucket(len(tokens) - done, capacity - state.offset)
            count = min(T, len(tokens) - done)
            x = self._embed(prompt, pictures, done, count, T)
            logits = self._run(x, count - 1, state)
            state.offset += count
            done += count
        assert logits is not None
        return logits

    def answer(self, prompt: Prompt, max_tokens: int) -> Iterator[int]:
        """The likeliest tokens one after the other, up to one that ends the answer.

        Raises:
            PromptError: the prompt is empty or longer than there is room.
        """
        state = self.start()
        logits = self.logits(prompt, state)
        for _ in range(max_tokens):
            token = int(logits.argmax())
            yield token
            full = state.offset == self.sidecar.capacity
            if token in self.sidecar.prompt.eos or full:
                return
            logits = self.logits(Prompt((token,)), state)

    def _bucket(self, wanted: int, room: int) -> int:
        """How many positions to run: the most that are wanted, padded if there is room."""
        buckets = [T for T in self.sidecar.buckets if room >= T]
        whole = [T for T in buckets if wanted >= T]
        padded = [T for T in buckets if wanted <= T]
        # What one padded run does costs less than several small ones.
        return padded[0] if padded else whole[-1]

    def _embed(
        self, prompt: Prompt, pictures: list[mx.array], start: int, count: int, T: int
    ) -> mx.array:
        """Embeddings [1, T, D] of some positions, filled up."""
        tokens = list(prompt.tokens[start : start + count])
        tokens += [self.sidecar.prompt.filler] * (T - count)
        embed = self.sidecar.find("embed", T)
        (x,) = self._call(embed, [mx.array([tokens], mx.int32)])
        for span in prompt.spans:
            first, last = max(span.start, start), min(span.stop, start + count)
            if first < last:
                at = span.offset + first - span.start
                rows = pictures[span.picture][at : at + last - first]
                x[:, first - start : last - start] = rows
        return x

    def _run(self, x: mx.array, last: int, state: State) -> mx.array:
        run = self.sidecar.find("run", x.shape[1])
        at = [mx.array(state.offset, mx.int32), mx.array(last, mx.int32)]
        logits, *state.caches = self._call(run, [x, *at, *state.caches])
        mx.eval(logits, state.caches)
        return logits

    def _call(self, function: Function, inputs: Sequence[mx.array]) -> list[mx.array]:
        return list(self.files[function.file](*inputs))

    def check(self) -> None:
        """Pass only if every function takes and gives what the sidecar says; none is run.

        Raises:
            CheckpointError: one does not.
        """
        for function in self.sidecar.functions:
            where = f"{self.folder / function.file}: {function.name}"
            taken = [list(x.shape) for x in function.inputs[:1]]
            try:
                found = self._call(function, [_zeros(x) for x in function.inputs])
            except (ValueError, RuntimeError):
                raise CheckpointError(
                    f"{where} does not take the shapes {taken}... that {SIDECAR} says; "
                    f"{AGAIN}"
                ) from None
            given = tuple(
                (tuple(x.shape), str(x.dtype).removeprefix("mlx.core.")) for x in found
            )
            if given != tuple((x.shape, x.dtype) for x in function.outputs):
                raise CheckpointError(
                    f"{where} does not give the shapes and types that {SIDECAR} says; "
                    f"{AGAIN}"
                )

    def try_thread(self) -> None:
        """Pass only if this thread can run them: they keep to mlx's first stream.

        Raises:
            CheckpointError: another thread used mlx first.
        """
        embed = self.sidecar.find("embed")
        try:
            mx.eval(self._call(embed, [_zeros(x) for x in embed.inputs]))
        except RuntimeError as error:
            raise CheckpointError(
                f"{self.folder}: the functions do not run here "
                f"({str(error).splitlines()[0]:.120}); open them on the thread that first "
                "used mlx"
            ) from None


def _zeros(array: Array) -> mx.array:
    return mx.zeros(array.shape, getattr(mx, array.dtype))


def open_program(folder: Path) -> Program:
    """The functions of a folder, after everything in it was checked.

    Raises:
        CheckpointError: the folder holds no functions, or not those that its sidecar
            says; or another version of mlx or another device is needed.
    """
    sidecar = read_sidecar(folder)
    for file in sidecar.files:
        path = safe_join(folder, file.name)
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist; {AGAIN}")
        if (size := path.stat().st_size) != file.bytes:
            raise CheckpointError(
                f"{path} has {size:,} bytes, expected {file.bytes:,}; copy it or {AGAIN}"
            )
        if sha256(path) != file.sha256:
            raise CheckpointError(
                f"{path} is not what was exported (its sha256 differs); copy it or {AGAIN}"
            )
    if sidecar.device == "gpu" and not mx.is_available(mx.gpu):
        raise CheckpointError(
            f"{folder} was exported on a GPU ({sidecar.chip}), and there is none here; "
            f"{AGAIN} on this machine"
        )
    files = {}
    for name in {function.file for function in sidecar.functions}:
        try:
            files[name] = mx.import_function(str(safe_join(folder, name)))
        except (ValueError, RuntimeError, MemoryError) as error:
            raise CheckpointError(
                f"{folder / name} cannot be read by mlx {MLX} "
                f"({str(error).splitlines()[0]:.120}); {AGAIN}"
            ) from None
    program = Program(folder, sidecar, files)
    program.check()
    program.try_thread()
    return program


def read_sidecar(folder: Path) -> Sidecar:
    """What a folder says of its functions, if this version of mlx can read them.

    Raises:
        CheckpointError: it holds none, or those of another version.
    """
    path = folder / SIDECAR
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds no exported functions ({SIDECAR} is missing); make it with "
            "'mm1 export mlxfn'"
        )
    values = read_json(path)
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise CheckpointError(f"{path} does not describe exported functions; {AGAIN}")
    # Before anything else is read: other versions may say other things.
    if (found := values.get("format_version")) != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {found!r:.20}, expected {FORMAT_VERSION}; {AGAIN}"
        )
    if (found := values.get("mlx")) != MLX:
        raise CheckpointError(
            f"{folder} was exported with mlx {found!r:.40} and this is mlx "
            f"{MLX}, which would read it as garbage; {AGAIN} with it"
        )
    try:
        sidecar = Sidecar.from_dict(values)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    listed = {file.name for file in sidecar.files}
    if strangers := {function.file for function in sidecar.functions} - listed:
        raise CheckpointError(
            f"{path} gives no digest of {sorted(strangers)[0]!r:.80}; {AGAIN}"
        )
    return sidecar
