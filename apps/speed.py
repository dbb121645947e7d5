"""Options that make answers faster or smaller in memory, and change none of them much."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated, Any

import typer

from .common import open_runtime

PrefixName = Annotated[
    str | None,
    typer.Option(
        "--prefix",
        help="answer behind what 'mm1 prefix save' kept under this name",
        show_default=False,
    ),
]
KVBits = Annotated[
    int | None,
    typer.Option(
        help="pack keys and values to 8 or 4 bits once there are many",
        show_default=False,
    ),
]
KVStart = Annotated[
    int | None,
    typer.Option(
        help="tokens from which on --kv-bits packs (default: 4096)",
        min=0,
        show_default=False,
    ),
]
PromptLookup = Annotated[
    bool,
    typer.Option(
        "--prompt-lookup", help="guess that the answer repeats what stands before"
    ),
]
DraftModel = Annotated[
    str | None,
    typer.Option(
        help="a smaller model of the same vocabulary that guesses ahead",
        show_default=False,
    ),
]
NumDraftTokens = Annotated[
    int | None,
    typer.Option(
        help="tokens that the draft model guesses at once (default: 4)",
        min=1,
        max=32,
        show_default=False,
    ),
]


def speed_settings(
    stack: ExitStack,
    *,
    prefix: str | None,
    kv_bits: int | None,
    kv_start: int | None,
    prompt_lookup: bool,
    draft_model: str | None,
    num_draft_tokens: int | None,
    yes: bool,
) -> dict[str, Any]:
    """The options as ``stream`` takes them; ``stack`` closes the draft model."""
    if prompt_lookup and draft_model is not None:
        raise typer.BadParameter(
            "--prompt-lookup and --draft-model both guess; give one"
        )
    for name, given, needed, need in (
        ("--kv-start", kv_start, "--kv-bits", kv_bits),
        ("--num-draft-tokens", num_draft_tokens, "--draft-model", draft_model),
    ):
        if given is not None and need is None:
            raise typer.BadParameter(f"{name} needs {needed}")
    settings: dict[str, Any] = {"kv_bits": kv_bits, "prompt_lookup": prompt_lookup}
    if prefix is not None:
        settings["prefix"] = prefix
    if kv_start is not None:
        settings["kv_start"] = kv_start
    if num_draft_tokens is not None:
        settings["num_draft_tokens"] = num_draft_tokens
    if draft_model is not None:
        settings["draft"] = stack.enter_context(open_runtime(draft_model, yes))
    return settings
