"""The limits of the server, each from the constant that holds it; the manual shows them."""

from __future__ import annotations

from mm1_mlx.answer import MAX_TOKENS
from mm1_mlx.grammar import MAX_BYTES, MAX_DEPTH, MAX_LEXER_STATES, MAX_VALUES
from mm1_mlx.image import DEFAULT_LIMITS

from .connections import MAX_HEAD
from .fields import COMPLETION_TOKENS
from .policy import MAX_PARALLEL, Policy
from .remote import SECONDS
from .run import GRACE
from .service import MOST_RETRY
from .watch import MAX_ID

# What, how much, and what happens beyond it.
Row = tuple[str, str, str]


def limits() -> dict[str, list[Row]]:
    """Every limit, under the heading that it belongs to; of a server without flags."""
    policy, pictures = Policy(), DEFAULT_LIMITS
    return {
        "A request": [
            ("its head", _bytes(MAX_HEAD), "400"),
            (
                "its body, with pictures read for it elsewhere",
                _bytes(policy.max_body),
                "413",
            ),
            (
                "the same of all requests under way",
                _bytes(policy.body_budget),
                "503",
            ),
            (
                "tokens of its prompt and answer",
                "the model's context",
                "400, an answer ends with `length`",
            ),
            ("characters of its `X-Request-Id`", f"{MAX_ID}", "it is given another"),
            ("`max_tokens`", f"{MAX_TOKENS:,}", "400"),
            (
                "tokens of a chat's answer that names none",
                f"{policy.max_tokens:,} (`--max-tokens`)",
                "`length`",
            ),
            ("of a completion that names none", f"{COMPLETION_TOKENS}", "`length`"),
        ],
        "Its pictures": [
            ("how many, in a chat", f"{pictures.max_pictures}", "400"),
            ("bytes of one", _bytes(pictures.max_bytes), "400"),
            ("pixels of one", f"{pictures.max_pixels:,}", "400"),
            ("pixels of all together", f"{pictures.max_total_pixels:,}", "400"),
            ("pixels of their tiles together", f"{pictures.max_tile_pixels:,}", "400"),
            ("a side, in pixels", f"{pictures.max_side:,}", "400"),
            ("the answer of another host", _seconds(SECONDS), "400"),
        ],
        "A JSON schema": [
            ("as JSON", _bytes(MAX_BYTES), "400"),
            ("values in it", f"{MAX_VALUES:,}", "400"),
            ("levels", f"{MAX_DEPTH}", "400"),
            ("states of what follows an answer", f"{MAX_LEXER_STATES:,}", "400"),
        ],
        "The server": [
            (
                "answers under way",
                f"{policy.parallel} (`--parallel`, at most {MAX_PARALLEL})",
                "the next wait",
            ),
            (
                "questions that wait; also requests for embeddings",
                f"{policy.max_waiting} (`--max-waiting`)",
                f"429, `Retry-After` of at most {_seconds(MOST_RETRY)}",
            ),
            ("connections", f"{policy.max_connections}", "503"),
        ],
        "Time": [
            ("for a request's head", _seconds(policy.header_seconds), "closed"),
            ("for its body", _seconds(policy.body_seconds), "408"),
            (
                "in which a client takes nothing of its answer",
                _seconds(policy.send_seconds),
                "the answer ends",
            ),
            (
                "in which a stream is silent",
                _seconds(policy.pulse_seconds),
                "a comment, `: still here`",
            ),
            (
                "between two tries to load a model that was let go",
                _seconds(policy.load_seconds),
                "503",
            ),
            (
                "for answers under way when the server is told to end",
                _seconds(GRACE),
                "they end",
            ),
        ],
    }


def _bytes(count: int) -> str:
    """A number of bytes that is a whole one of larger units."""
    for power, unit in ((20, "MiB"), (10, "KiB")):
        if count % (1 << power) == 0:
            return f"{count >> power:,} {unit}"
    return f"{count:,} bytes"


def _seconds(count: float) -> str:
    return f"{count:g} seconds"
