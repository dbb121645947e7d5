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
    int, typer.Option(help="tokens from which on --kv-bits packs", min=0)
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
    int, typer.Option(help="tokens that the draft model guesses at once", min=1, max=32)
]


def speed_settings(
    stack: ExitStack,
    *,
    kv_bits: int | None,
    kv_start: int,
    prompt_lookup: bool,
    draft_model: str | None,
    num_draft_tokens: int,
    yes: bool,
) -> dict[str, Any]:
    """The options as ``stream`` takes them; ``stack`` closes the draft model."""
    if prompt_lookup and draft_model is not None:
        raise typer.BadParameter(
            "--prompt-lookup and --draft-model both guess; give one"
        )
    draft = None
    if draft_model is not None:
        draft = stack.enter_context(open_runtime(draft_model, yes))
    return {
        "kv_bits": kv_bits,
        "kv_start": kv_start,
        "prompt_lookup": prompt_lookup,
        "draft": draft,
        "num_draft_tokens": num_draft_tokens,
    }
