"""``mm1 generate``: one answer, streamed."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from .common import (
    AsJson,
    MaxTokens,
    Model,
    Seed,
    System,
    Temperature,
    TopP,
    Yes,
    note,
    open_runtime,
    picture,
    print_answer,
    print_json,
)


def generate(
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="the question; - reads stdin")
    ],
    image: Annotated[
        list[str] | None,
        typer.Option(
            "--image", "-i", help="a picture, several times; - reads stdin",
            show_default=False,
        ),
    ] = None,
    model: Model = None,
    system: System = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="end before this text, several times", show_default=False),
    ] = None,
    as_json: AsJson = False,
    yes: Yes = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="print timings on stderr")
    ] = False,
) -> None:  # fmt: skip
    """Answer one question, with or without pictures."""
    if [prompt, *(image or [])].count("-") > 1:
        raise typer.BadParameter("stdin can be read once; give '-' once")
    images = [picture(source) for source in image or []]
    if prompt == "-":
        prompt = sys.stdin.read()
    settings: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "stop": stop or [],
    }
    messages = [{"role": "user", "content": prompt}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    with open_runtime(model, yes) as runtime:
        if as_json:
            _print_answer(runtime, messages, images, settings)
        else:
            _print_stream(runtime, messages, images, settings, verbose)


def _print_answer(
    runtime: Any, messages: Any, images: list[str | bytes], settings: dict[str, Any]
) -> None:
    from mm1_mlx import runtime as core

    answer = asdict(core.generate(runtime, messages, images, **settings))
    # As the streamed form prints it.
    print_json(answer | {"text": answer["text"].lstrip()})


def _print_stream(
    runtime: Any,
    messages: Any,
    images: list[str | bytes],
    settings: dict[str, Any],
    verbose: bool,
) -> None:
    from mm1_mlx import runtime as core

    stats, leading = None, True
    for piece in core.stream(runtime, messages, images, **settings):
        # Many tokenizers begin an answer with a space.
        text = piece.text.lstrip() if leading else piece.text
        leading = leading and not text
        print_answer(text)
        stats = piece.stats
    print()
    if verbose and stats:
        note(summary(stats))


def summary(stats: Any) -> str:
    """Counts and speed of an answer, in a line."""
    times = stats.timings
    return (
        f"{stats.prompt_tokens} prompt tokens ({stats.image_tokens} of pictures), "
        f"first token after {times.first_token:.2f} s; "
        f"{stats.generated_tokens} tokens at {times.decode_rate:.0f} per second"
    )
