"""Logits that are moved, how likely tokens were, and the bytes that they write."""

import mlx.core as mx
import numpy as np
import pytest

from mm1_mlx.answer import Piece, Score
from mm1_mlx.bias import Bias
from mm1_mlx.sampling import Sampler
from mm1_mlx.scores import Scores
from mm1_mlx.spelling import Spelling
from mm1_mlx.transcript import Transcript

LOGITS = mx.random.normal((12, 40), key=mx.random.key(1)) * 2


def test_biases_and_penalties_move_what_they_should():
    bias = Bias(4, {1: 2.0, 3: -100.0}, presence=0.5, frequency=0.25)
    zeros = mx.zeros(4)
    assert bias.move(zeros).tolist() == [0, 2, 0, -100]
    for token in (0, 0, 1):
        bias.accept(mx.array([token]))
    assert bias.move(zeros).tolist() == [-1, 2 - 0.75, 0, -100]
    bias.rewind(2)
    assert bias.move(zeros).tolist() == [-0.75, 2, 0, -100]
    assert bias.move(mx.zeros(4, mx.float16)).dtype == mx.float32


def test_a_penalised_token_is_not_said_again():
    sampler = Sampler(bias=Bias(40, {}, frequency=2.0))
    same = mx.broadcast_to(LOGITS[:1], (8, 40))
    drawn = sampler(same).tolist()
    assert len(set(drawn)) > 1
    sampler.rewind(8)
    one_by_one = [int(sampler(same[:1])) for _ in range(8)]
    assert one_by_one == drawn


def test_rewound_tokens_are_neither_counted_nor_scored_twice():
    def sampler():
        return Sampler(1.0, seed=2, bias=Bias(40, {}, presence=1.5), scores=Scores(2))

    whole, parts = sampler(), sampler()
    expected = whole(LOGITS).tolist()
    parts(mx.concatenate([LOGITS[:4], LOGITS[:3]]))
    parts.rewind(3)
    assert parts(LOGITS[4:]).tolist() == expected[4:]
    for i, token in enumerate(expected):
        score = parts.scores.take(i)
        assert score == whole.scores.take(i)
        assert score.token == token


@pytest.mark.parametrize("count", [0, 1, 5, 100])
def test_scores_are_the_models_own(count):
    scores = Scores(count)
    Sampler(0.7, seed=1, scores=scores, bias=Bias(40, {3: 50.0}))(LOGITS)
    expected = np.array(LOGITS - mx.logsumexp(LOGITS, axis=-1, keepdims=True))
    for i, row in enumerate(expected):
        score = scores.take(i)
        assert score.token == 3
        assert score.logprob == pytest.approx(row[3], abs=1e-5)
        order = np.argsort(-row)[: min(count, 40)]
        assert [token for token, _ in score.likeliest] == order.tolist()
        likeliest = [value for _, value in score.likeliest]
        np.testing.assert_allclose(likeliest, row[order], atol=1e-5)


def test_a_token_that_only_pads_has_no_bytes(any_tokenizer):
    assert Spelling(any_tokenizer)(any_tokenizer.size + 5) == b""


def scorer_of(tokenizer):
    logprobs = pytest.importorskip("mm1_mlx.apps.server.logprobs")
    return logprobs.Scorer(Spelling(tokenizer))


def pieces(tokenizer, tokens, stop=()):
    """What an answer of these tokens gives, each with a score."""
    transcript = Transcript(tokenizer, stop)
    for token in tokens:
        piece = transcript.add(token)
        yield Piece(
            piece.text, token, piece.finish_reason, None, Score(token, -1.0, ())
        )
        if piece.finish_reason:
            return
    yield transcript.finish("length")


def test_spelled_tokens_are_the_text_that_is_written(any_tokenizer):
    random = np.random.default_rng(0)
    texts = ["a blue star", " red", "h\u00e9llo \u4f60\u597d \U0001f600!", "  two  "]
    written = [any_tokenizer.encode(t, add_special_tokens=False) for t in texts]
    drawn = random.integers(4, any_tokenizer.size, (60, 8)).tolist()
    ends = any_tokenizer.hf.eos_token_ids
    for tokens in [*written, *drawn]:
        scorer, told, said = scorer_of(any_tokenizer), [], ""
        for piece in pieces(any_tokenizer, [t for t in tokens if t not in ends]):
            told += scorer.add(piece)
            said += piece.text
        spelled = b"".join(scored.text for scored in told)
        # Spaces that may yet be followed by something are not written.
        assert spelled.decode(errors="replace").rstrip(" ") == said.rstrip(" ")


def test_offsets_are_where_tokens_begin(any_tokenizer):
    tokens = any_tokenizer.encode("a blue \u4f60\u597d star", add_special_tokens=False)
    scorer, told, said = scorer_of(any_tokenizer), [], ""
    for piece in pieces(any_tokenizer, tokens):
        told += scorer.add(piece)
        said += piece.text
    assert len(told) == len(tokens)
    whole = b"".join(scored.text for scored in told)
    assert whole.decode() == said
    at = 0
    for scored in told:
        # In characters: an incomplete one is none yet.
        assert scored.start == len(whole[:at].decode(errors="ignore"))
        at += len(scored.text)


def test_tokens_of_a_stop_string_are_not_told(any_tokenizer):
    tokens = any_tokenizer.encode("a red star", add_special_tokens=False)
    scorer, told, said = scorer_of(any_tokenizer), [], ""
    for piece in pieces(any_tokenizer, tokens, ["red"]):
        said += piece.text
        told += scorer.add(piece)
    assert said.strip() == "a"
    assert all(scored.start < len(said) for scored in told)
    assert b"".join(scored.text for scored in told).decode().startswith(said)
