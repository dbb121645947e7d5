"""Answers as they are written, and what all of them took together."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection

from mm1_mlx.answer import Piece, Stats
from mm1_mlx.spelling import Spelling

from .logprobs import Scored, Scorer
from .replies import FinishReason, PromptDetails, Timings, Usage


class Written:
    """One answer, piece by piece.

    Args:
        spelling: of the model's tokens.
    """

    def __init__(self, spelling: Spelling) -> None:
        self._scorer = Scorer(spelling)
        self._texts: list[str] = []
        self._last: Piece | None = None
        # The scores of its tokens so far.
        self.told: list[Scored] = []

    def add(self, piece: Piece) -> list[Scored]:
        """Take the next piece; the scores that come with it."""
        self._texts.append(piece.text)
        self._last = piece
        told = self._scorer.add(piece)
        self.told += told
        return told

    @property
    def text(self) -> str:
        """All of it so far."""
        return "".join(self._texts)

    @property
    def reason(self) -> FinishReason:
        """Why it ended."""
        assert self._last is not None
        reason = self._last.finish_reason
        # Cancelled are those whose caller has left.
        assert reason in ("stop", "length")
        return reason

    @property
    def stats(self) -> Stats:
        """What it took, once it has ended."""
        assert self._last is not None
        assert self._last.stats is not None
        return self._last.stats


async def collect(
    pieces: AsyncIterator[tuple[int, Piece]], count: int, spelling: Spelling
) -> list[Written]:
    """``count`` answers, whole."""
    answers = [Written(spelling) for _ in range(count)]
    async for number, piece in pieces:
        answers[number].add(piece)
    return answers


def usage_of(stats: Collection[Stats], count: int) -> Usage:
    """The tokens of answers, ``count`` of which share each prompt."""
    prompts = [each for i, each in enumerate(stats) if i % count == 0]
    prompt = sum(each.prompt_tokens for each in prompts)
    answered = sum(each.generated_tokens for each in stats)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=answered,
        total_tokens=prompt + answered,
        prompt_tokens_details=PromptDetails(
            cached_tokens=sum(each.cached_tokens for each in prompts),
            image_tokens=sum(each.image_tokens for each in prompts),
        ),
    )


def timings_of(stats: Collection[Stats], count: int) -> Timings:
    """The seconds of answers, ``count`` of which share each prompt."""
    times = [each.timings for each in stats]
    first = min(time.first_token for time in times)
    last = max(time.total for time in times)
    # The first token of the first answer is there at the beginning.
    following = sum(each.generated_tokens for each in stats) - 1
    prompts = [each for i, each in enumerate(stats) if i % count == 0]
    return Timings(
        prompt_tokens=sum(each.prompt_tokens for each in prompts),
        prompt_seconds=sum(
            each.timings.encode + each.timings.prefill for each in prompts
        ),
        ttft_seconds=first,
        total_seconds=last,
        tokens_per_second=following / (last - first) if last > first else 0.0,
    )
