"""``mm1 generate``: one answer, streamed."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .common import (
    AdapterNames,
    AsJson,
    Images,
    MaxTokens,
    Model,
    Resolution,
    Seed,
    System,
    Temperature,
    TopP,
    VisionBackend,
    Yes,
    human_bytes,
    note,
    open_runtime,
    picture,
    print_answer,
    print_json,
)
from .regions import (
    Boxes,
    Draw,
    Masks,
    Points,
    draw_answer,
    find_boxes,
    place_regions,
    read_regions,
)
from .schema import SchemaFile, read_schema
from .speed import (
    DraftModel,
    KVBits,
    KVStart,
    NumDraftTokens,
    PrefixName,
    PromptLookup,
    speed_settings,
)


def generate(
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="the question; - reads stdin")
    ],
    image: Images = None,
    video: Annotated[
        str | None,
        typer.Option(
            help="an animated picture, or a folder of frames", show_default=False
        ),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(
            help="frames taken of the video, evenly apart (default: 24 with the pictures)",
            min=1, show_default=False,
        ),
    ] = None,
    box: Boxes = None,
    point: Points = None,
    mask: Masks = None,
    draw: Draw = None,
    shots: Annotated[
        Path | None,
        typer.Option(
            help="solved examples, JSONL: image, question, answer; or image, caption",
            show_default=False,
        ),
    ] = None,
    shot_style: Annotated[
        Literal["auto", "chat", "caption", "vqa"],
        typer.Option(help="examples as turns, or as a base model's text"),
    ] = "auto",
    think: Annotated[
        bool, typer.Option("--think", help="ask for a chain of thought first")
    ] = False,
    resolution: Resolution = None,
    tiled: Annotated[
        int | None,
        typer.Option(
            help="split only this many of the last pictures into tiles",
            min=0, show_default=False,
        ),
    ] = None,
    model: Model = None,
    adapter: AdapterNames = None,
    vision_backend: VisionBackend = "mlx",
    system: System = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="end before this text, several times", show_default=False),
    ] = None,
    schema: SchemaFile = None,
    prefix: PrefixName = None,
    kv_bits: KVBits = None,
    kv_start: KVStart = None,
    prompt_lookup: PromptLookup = False,
    draft_model: DraftModel = None,
    num_draft_tokens: NumDraftTokens = None,
    as_json: AsJson = False,
    yes: Yes = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", help="print what it will take, and took, on stderr"
        ),
    ] = False,
) -> None:  # fmt: skip
    """Answer one question, with or without pictures."""
    if [prompt, video, *(image or [])].count("-") > 1:
        raise typer.BadParameter("stdin can be read once; give '-' once")
    if frames and video is None:
        raise typer.BadParameter("--frames needs --video")
    if shot_style != "auto" and shots is None:
        raise typer.BadParameter("--shot-style needs --shots")
    regions = read_regions(box, point, mask)
    if regions and not (image or video or shots or prefix):
        raise typer.BadParameter(
            "--box, --point and --mask are places in a picture; give it by -i"
        )
    images = [picture(source) for source in image or []]
    # The picture that boxes of the answer are in.
    shown = images[0] if len(images) == 1 and not video else None
    if draw:
        _check_drawing(draw, shown, len(images))
    if prompt == "-":
        prompt = sys.stdin.read()
    question = place_regions(prompt, regions)
    if think:
        from mm1_mlx.shots import THINK

        question.append({"type": "text", "text": f" {THINK}" if prompt else THINK})
    settings: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "stop": stop or [],
        "tiled": tiled,
        "shot_style": shot_style,
        "schema": read_schema(schema),
    }
    if shots:
        from mm1_mlx.shots import read_shots

        settings["shots"] = read_shots(shots)
    messages = _messages(question, images, system, video, frames)
    with ExitStack() as stack:
        settings |= speed_settings(
            stack,
            prefix=prefix,
            kv_bits=kv_bits,
            kv_start=kv_start,
            prompt_lookup=prompt_lookup,
            draft_model=draft_model,
            num_draft_tokens=num_draft_tokens,
            yes=yes,
        )
        runtime = stack.enter_context(
            open_runtime(model, yes, resolution, adapter, vision_backend)
        )
        if verbose:
            from mm1_mlx.runtime import forecast

            note(outlook(forecast(runtime, messages, **settings)))
        if as_json:
            text = _print_answer(runtime, messages, settings, think, shown)
        else:
            text = _print_stream(runtime, messages, settings, verbose)
        if draw and shown is not None:
            draw_answer(text, shown, runtime.config, draw)


def _check_drawing(out: Path, shown: str | bytes | None, count: int) -> None:
    from mm1_mlx.grounding import check_drawing
    from mm1_mlx.image import DEFAULT_LIMITS, name_of, open_picture

    if shown is None:
        raise typer.BadParameter(
            f"--draw needs one picture, got {count} and perhaps a video: the answer "
            "does not say which one a box is in"
        )
    picture = open_picture(shown, name_of(shown, 1), DEFAULT_LIMITS)
    check_drawing(out, picture.size)


def _messages(
    question: list[dict[str, Any]],
    images: list[str | bytes],
    system: str | None,
    video: str | None,
    frames: int | None,
) -> list[dict[str, Any]]:
    """The conversation: the pictures, the video, then the question."""
    parts: list[dict[str, Any]] = [{"type": "image", "image": i} for i in images]
    if video is not None:
        from mm1_mlx.image import DEFAULT_LIMITS

        room = max(1, DEFAULT_LIMITS.max_pictures - len(images))
        source = {"video": picture(video), "frames": frames or room}
        parts.append({"type": "video", **source})
    messages = [{"role": "user", "content": [*parts, *question]}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _print_answer(
    runtime: Any,
    messages: Any,
    settings: dict[str, Any],
    think: bool,
    shown: str | bytes | None,
) -> str:
    """Print the answer as JSON, with boxes where they can be in one picture only."""
    from mm1_mlx import runtime as core
    from mm1_mlx.shots import final_answer

    answer = asdict(core.generate(runtime, messages, **settings))
    # As the streamed form prints it.
    answer["text"] = answer["text"].lstrip()
    if think:
        answer["answer"] = final_answer(answer["text"])
    if shown is not None:
        _, boxes = find_boxes(answer["text"], shown, runtime.config)
        answer["boxes"] = [asdict(box) for box in boxes]
    print_json(answer)
    return str(answer["text"])


def _print_stream(
    runtime: Any,
    messages: Any,
    settings: dict[str, Any],
    verbose: bool,
) -> str:
    """Print the answer as it is written."""
    from mm1_mlx import runtime as core

    stats, leading, whole = None, True, ""
    for piece in core.stream(runtime, messages, **settings):
        # Many tokenizers begin an answer with a space.
        text = piece.text.lstrip() if leading else piece.text
        leading = leading and not text
        print_answer(text)
        whole += text
        stats = piece.stats
    print()
    if verbose and stats:
        note(summary(stats))
    return whole


def outlook(expected: Any) -> str:
    """What an answer will take, in a line, from its Forecast."""
    least = ""
    if expected.first_token is not None:
        least = f"; at least {expected.first_token:.2g} s to the first token"
    if expected.total is not None:
        least += f", {expected.total:.2g} s to token {expected.max_tokens}"
    cached = (
        f", {expected.cached_tokens} of them known" if expected.cached_tokens else ""
    )
    return (
        f"expected: {expected.prompt_tokens} prompt tokens{cached}, "
        f"{human_bytes(expected.bytes)} beside the weights{least}"
    )


def summary(stats: Any) -> str:
    """Counts and speed of an answer, in a line."""
    times = stats.timings
    cached = f", {stats.cached_tokens} known before" if stats.cached_tokens else ""
    return (
        f"{stats.prompt_tokens} prompt tokens ({stats.image_tokens} of pictures{cached}), "
        f"first token after {times.first_token:.2f} s; "
        f"{stats.generated_tokens} tokens at {times.decode_rate:.0f} per second"
    )
