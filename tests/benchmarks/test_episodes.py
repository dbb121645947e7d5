"""New words: what they mean follows from the examples, and only from them."""

from collections import Counter
from itertools import product

import pytest

from benchmarks.shapes.episodes import (
    HELD_OUT_ENDINGS,
    random_episode,
    random_words,
)
from benchmarks.shapes.scene import HELD_OUT, SEEN_PAIRS, SHAPES, UNNAMED, split_rng


def episodes(count, shots=8, **options):
    for seed in range(count):
        episode = random_episode(split_rng("train", seed), SEEN_PAIRS, shots, **options)
        assert episode is not None
        yield episode


def meanings(episode):
    """Of each word, the colours and the shapes that it was said of."""
    said = {}
    for pair, word in zip(episode.pairs, episode.words, strict=True):
        colours, shapes = said.setdefault(word, (set(), set()))
        colours.add(pair[0])
        shapes.add(pair[1])
    return list(said.values())


@pytest.mark.parametrize("shots", [4, 6, 8])
def test_two_words_tell_two_shapes_or_two_colours_apart(shots):
    kinds = Counter()
    for episode in episodes(300, shots):
        assert len(episode.pairs) == len(episode.words) == shots + 1
        (colours, shapes), (others, forms) = meanings(episode)
        by_shape = len(shapes) == len(forms) == 1 and shapes != forms
        by_colour = len(colours) == len(others) == 1 and colours != others
        assert by_shape or by_colour
        kinds[by_shape] += 1
        # Each word has as many examples; the pair that is asked about is in none.
        counts = Counter(episode.words[:-1])
        assert set(counts.values()) == {shots // 2}
        assert episode.pairs[-1] not in [
            pair
            for pair, word in zip(episode.pairs[:-1], episode.words[:-1], strict=True)
            if word == episode.words[-1]
        ]
    assert min(kinds.values()) > 100


def test_examples_that_are_alike_show_what_is_asked_about():
    for episode in episodes(100, alike=True):
        (colours, shapes), (others, forms) = meanings(episode)
        assert len(colours) == len(shapes) == len(others) == len(forms) == 1
        assert (colours, shapes) != (others, forms)


def test_narrow_examples_show_another_pair_that_shares_what_the_word_names():
    kinds = Counter()
    for episode in episodes(300, narrow=True):
        query, asked = episode.pairs[-1], episode.words[-1]
        told = [*zip(episode.pairs[:-1], episode.words[:-1], strict=True)]
        (own,) = {pair for pair, word in told if word == asked}
        others = {pair for pair, word in told if word != asked}
        assert len(others) <= 2
        # One half of the pair is the word's, and the other word shares neither.
        halves = own[0] == query[0], own[1] == query[1]
        assert sum(halves) == 1
        assert not any(p[0] == query[0] or p[1] == query[1] for p in others)
        kinds[halves, len(others)] += 1
    # By colour and by shape, and the other word mostly of two pairs.
    assert len(kinds) >= 3
    assert sum(n for (_, others), n in kinds.items() if others == 2) > 200


@pytest.mark.parametrize("narrow", [False, True])
def test_half_of_a_pair_does_not_tell_its_word(narrow):
    seen = Counter()
    for episode in episodes(2000, narrow=narrow, known=SEEN_PAIRS):
        (colours, shapes), (others, forms) = meanings(episode)
        # What either was said of, with the half that the other names.
        swapped = {*product(colours, forms), *product(others, shapes)}
        assert not swapped & HELD_OUT
        seen[frozenset((*shapes, *forms))] += 1
    # Triangles and hearts are told apart all the same.
    assert seen[frozenset(("triangle", "heart"))] > 20


def test_what_has_no_name_for_its_colour_is_called_by_its_shape():
    pairs = [*SEEN_PAIRS, *((UNNAMED, shape) for shape in SHAPES)]
    seen = 0
    for seed in range(300):
        rng = split_rng("train", seed)
        episode = random_episode(rng, pairs, 8, alike=seed % 2 == 0)
        if UNNAMED in {colour for colour, _ in episode.pairs}:
            assert seed % 2
            (_, shapes), (_, others) = meanings(episode)
            assert len(shapes) == len(others) == 1
            seen += 1
    assert seen > 30


def test_neither_word_is_asked_for_more_often_or_stands_more_often_last():
    last = [e.words[-1] == e.words[-2] for e in episodes(600)]
    first = [e.words[-1] == e.words[0] for e in episodes(600)]
    assert 0.4 < sum(last) / 600 < 0.6
    assert 0.4 < sum(first) / 600 < 0.6


def test_words_are_unknown_when_they_are_first_said():
    for episode in episodes(50):
        first = [episode.words.index(word) for word in dict.fromkeys(episode.words)]
        assert list(episode.unknown) == first


def test_held_out_words_end_as_no_training_word_does():
    rng = split_rng("train", 1)
    known = {word for _ in range(3000) for word in random_words(rng)}
    assert not any(word.endswith(HELD_OUT_ENDINGS) for word in known)
    new = [random_words(rng, held_out=True) for _ in range(300)]
    assert all(word.endswith(HELD_OUT_ENDINGS) for words in new for word in words)
    assert all(a != b for a, b in new)


def test_too_few_pictures_make_no_episode():
    assert random_episode(split_rng("train", 0), SEEN_PAIRS[:1], 8) is None


def test_only_what_can_be_known_is_learned(conversations, tokenizer):
    batch = conversations("episodes")
    assert len(batch.rows) == 2
    for rows in batch.rows:
        for tokens, learned in zip(rows.batch.tokens, rows.batch.learned, strict=True):
            text = tokenizer.hf.decode(tokens.tolist())
            said = tokenizer.hf.decode(tokens[learned].tolist()).split("</s>")
            answers = [
                turn.split("</s>")[0].strip() for turn in text.split("ASSISTANT:")[1:]
            ]
            firsts = [answers.index(word) for word in dict.fromkeys(answers)]
            expected = [w for i, w in enumerate(answers) if i not in firsts]
            assert [word.strip() for word in said if word.strip()] == expected


def test_what_is_shown_is_known_where_it_is_named(conversations, tokenizer):
    for rows in conversations("episodes").rows:
        tokens = rows.batch.tokens.flatten()
        before, first = rows.examples.tokens[::2], rows.examples.tokens[1::2]
        assert {tokenizer.hf.decode([int(tokens[t])]) for t in before} == {"ASSISTANT:"}
        assert (first == before + 1).all()
