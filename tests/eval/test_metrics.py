"""Published metrics, on values counted by hand and on those of the published code.

The published code itself was run beside this one when it was written: VQA's evaluation
(20,000 random questions whose ten answers differ: the same accuracies), pycocoevalcap's
CIDEr (20 random corpora: the same to 2e-15) and Stanford's PTBTokenizer 3.4.1 (the 1,000
captions of pycocoevalcap's example and 1,800 with numbers: the same words). What it said
of some drawn questions and captions is kept in ``published.json``.
"""

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest

from mm1_mlx.eval.anls import anls, levenshtein
from mm1_mlx.eval.case import Case
from mm1_mlx.eval.cider import cider
from mm1_mlx.eval.exact import exact_match
from mm1_mlx.eval.existence import pope, says_yes
from mm1_mlx.eval.intervals import bootstrap, mean, share, wilson
from mm1_mlx.eval.letters import find_option
from mm1_mlx.eval.metrics import METRICS, Reply
from mm1_mlx.eval.recall import overlap
from mm1_mlx.eval.relaxed import relaxed_match
from mm1_mlx.eval.treebank import words
from mm1_mlx.eval.vqa import normalise, vqa_accuracy
from mm1_mlx.train.data.questions import list_options

PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text())


def test_vqa_accuracies_are_those_of_the_published_code():
    cases = PUBLISHED["vqa"]
    said = [vqa_accuracy(case["answer"], case["answers"]) for case in cases]
    # It gives hundredths of a percent.
    assert said == pytest.approx([case["accuracy"] for case in cases], abs=6e-5)
    assert len({round(x, 3) for x in said}) >= 5


def test_words_are_those_of_the_published_code():
    for case in PUBLISHED["ptb"]:
        assert words(case["caption"]) == case["words"]


def test_cider_is_that_of_the_published_code():
    for case in PUBLISHED["cider"]:
        scores = cider(case["captions"], case["references"])
        assert scores == pytest.approx(case["scores"], abs=1e-12)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Yes", "yes"),
        ("the Two dogs", "2 dogs"),
        ("none", "0"),
        ("dont", "don't"),
        ("shouldnt've", "shouldn't've"),
        ("couldn'tve", "couldn't've"),
        ("Im", "im"),  # Upstream lists it with a capital, and so never finds it.
        ("somebody'd", "somebodyd"),
        ("t-shirt", "t shirt"),
        ("red, white", "red white"),
        ("red,white", "red white"),
        ("1,000", "1000"),
        ("1,000/day", "1000day"),
        ("2.5", "2.5"),
        ("st. john.", "st john"),
        ("it's 10:30", "it's 10:30"),
        ("a\nbook\t", "book"),
        ("?", ""),
    ],
)
def test_answers_are_normalised_as_vqa_does(text, normal):
    assert normalise(text) == normal


def test_vqa_accuracy_is_the_mean_over_nine_of_ten_people():
    # Of three who agree each is left out once: 3 x 2/3 and 7 x 1.
    answers = ["red"] * 3 + ["blue"] * 7
    assert vqa_accuracy("Red.", answers) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert vqa_accuracy("red", ["red"] * 4 + ["blue"] * 6) == 1
    assert vqa_accuracy("red", ["red"] + ["blue"] * 9) == pytest.approx(0.3)
    assert vqa_accuracy("green", answers) == 0
    assert vqa_accuracy("Yes", ["yes"] * 10) == 1


def test_a_single_answer_is_met_exactly():
    assert vqa_accuracy("A dog", ["dog"]) == 1
    assert vqa_accuracy("dogs", ["dog"]) == 0


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        # What Stanford's PTBTokenizer 3.4.1 gives for them.
        ("A man's dog doesn't like the dogs' food.",
         "a man 's dog does n't like the dogs food"),
        ("I can't, won't and shouldn't've gone; they're gonna cannot.",
         "i ca n't wo n't and should n't 've gone they 're gon na can not"),
        ("Two t-shirts, 1,000 cars and 2.5 litres at 10:30 a.m. by day",
         "two t-shirts 1,000 cars and 2.5 litres at 10:30 a.m. by day"),
        ('A sign that reads "STOP (now)" -- really!',
         "a sign that reads stop -lrb- now -rrb- really"),
        ("It's a black-and-white photo of o'clock and rock 'n' roll",
         "it 's a black-and-white photo of o'clock and rock 'n' roll"),
        ("a cat/dog mix costs $5.00 or 50% off #1 @home",
         "a cat/dog mix costs $ 5.00 or 50 % off # 1 @home"),
        ("A stop sign.A red car", "a stop sign.a red car"),
        ("Hello!!! What?! Yes...no", "hello !!! what ?! yes no"),
        ("'tis a 1950's car; y'all'll see", "'t is a 1950 's car y' all 'll see"),
        ("\u201cquoted\u201d \u2013 someone\u2019s", "quoted someone 's"),
        ("", ""),
    ],
)  # fmt: skip
def test_captions_are_split_as_the_treebank_does(caption, expected):
    assert words(caption) == expected.split()


def test_many_endings_take_no_longer_than_they_are():
    """By turns each search would read what is left: half a minute for these."""
    began = time.perf_counter()
    assert words("a" + "'d" * 20_000) == ["a", *["'d"] * 20_000]
    assert words("a'd" * 20_000) == ["a'd" * 19_999 + "a", "'d"]
    assert words("an'tn't'd") == ["a", "n't", "n't", "'d"]
    assert time.perf_counter() - began < 2


def test_cider_of_a_corpus_that_can_be_counted_by_hand():
    """Two pictures: an n-gram of one of them weighs log 2, of both nothing."""
    references = [["a red star"], ["a blue heart"]]
    # "a" weighs nothing, all others log 2: cosines of 1, 2 and 3 words are 1, and there
    # are no four. 10 x (1 + 1 + 1 + 0) / 4.
    assert cider(["a red star", "a blue heart"], references) == pytest.approx(
        [7.5, 7.5]
    )
    # Of "red", "star" one is met; of "a red", "red star" one; of three words none: the
    # weights of what is met are clipped to the reference's. Lengths are equal.
    assert cider(["a red heart", "a"], references)[0] == pytest.approx(
        10 * (1 / 2 + 1 / 2 + 0) / 4
    )
    # One pair of words fewer than the reference's two.
    shorter = cider(["red star", "a"], references)[0]
    one_pair = 1 / math.sqrt(2)
    assert shorter == pytest.approx(10 * (1 + one_pair) / 4 * math.exp(-1 / 72))


def test_repeated_words_gain_nothing_in_cider():
    references = [["a red star on a hill"], ["a blue heart"], ["two dogs"]]
    once = cider(["red star", "", ""], references)[0]
    assert cider(["red red red star star star", "", ""], references)[0] < once
    assert cider(["", "", ""], references) == [0, 0, 0]


def test_cider_of_a_single_picture_is_0():
    assert cider(["a red star"], [["a red star"]]) == [0]


def test_cider_is_the_mean_over_references():
    alike, other = "a red star", "two brown dogs"
    corpus = [["a blue heart"]]
    both = cider([alike, ""], [[alike, other], *corpus])[0]
    assert both == pytest.approx(cider([alike, ""], [[alike], *corpus])[0] / 2)


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2)],
)
def test_levenshtein_distances_are_the_textbooks(one, other, distance):
    assert levenshtein(one, other) == levenshtein(other, one) == distance


def test_anls_forgives_a_few_letters():
    assert anls("Kitten", ["kitten", "cat"]) == 1
    assert anls("kitten", ["sitting"]) == pytest.approx(1 - 3 / 7)
    # 3 of 6 letters changed is half, which still counts; 4 is not.
    assert anls("abcdef", ["abcxyz"]) == 0.5
    assert anls("abcdef", ["abwxyz"]) == 0
    assert anls("", ["x"]) == 0
    # Spaces count in the lengths alone.
    assert anls("a b", ["a   b"]) == 1


def test_anls_does_not_compare_what_cannot_be_alike():
    began = time.perf_counter()
    assert anls("a" * 300, ["a" * 100_000]) == 0
    assert time.perf_counter() - began < 1


@pytest.mark.parametrize(
    ("answer", "right", "matches"),
    [
        ("105", "100", True),
        ("105.1", "100", False),
        ("95", "100", True),
        ("-95", "-100", True),
        ("5%", "0.05", True),
        ("5", "5%", False),
        ("0.0", "0", False),  # Upstream's way of numbers with nothing to be 5 % of.
        ("0", "0", True),
        ("Yes", "yes", True),
        ("yes.", "yes", False),
        ("nan", "5", False),
    ],
)
def test_relaxed_accuracy_bears_five_percent(answer, right, matches):
    assert relaxed_match(answer, right) is matches


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("yes", True),
        ("No, there is none.", False),
        ("There is not.", False),
        ("Yes. No more.", True),
        ("There is a dog", True),
        ("nothing", True),
    ],
)
def test_what_a_sentence_says_is_read_as_llava_does(answer, yes):
    assert says_yes(answer) is yes


def test_pope_counts_what_is_seen_and_made_up():
    said = [True, True, True, False, False, True]
    right = [True, False, True, True, False, True]
    figures = pope(said, right)
    values = {name: figure.value for name, figure in figures.items()}
    assert values == pytest.approx(
        {
            "accuracy": 4 / 6,
            "precision": 3 / 4,
            "recall": 3 / 4,
            "f1": 3 / 4,
            "yes_ratio": 4 / 6,
        }
    )
    assert figures["accuracy"].chance == 0.5


def test_f1_is_the_harmonic_mean():
    figures = pope([True, True, False, False, False], [True, False, True, True, True])
    p, r = figures["precision"].value, figures["recall"].value
    assert (p, r) == (0.5, 0.25)
    assert figures["f1"].value == pytest.approx(2 * p * r / (p + r))


def test_pope_of_no_yes_at_all_is_0():
    figures = pope([False, False], [True, False])
    assert figures["precision"].value == figures["f1"].value == 0
    assert (figures["precision"].n, figures["precision"].low) == (0, None)


def test_precision_and_recall_are_shares_of_their_own_questions():
    figures = pope([True, True, True, False], [True, True, False, True])
    for name in ("precision", "recall"):
        figure = figures[name]
        assert figure.n == 3
        assert (figure.low, figure.high) == wilson(2, 3)
    # Ten of ten do not say that all others are right.
    sure = pope([True] * 10, [True] * 10)
    assert sure["precision"].low == wilson(10, 10)[0]
    assert (sure["f1"].value, sure["f1"].low, sure["f1"].high) == (1, None, None)


def test_draws_without_a_yes_do_not_make_f1_nothing():
    figure = pope([True, False], [True, False])["f1"]
    assert (figure.value, figure.low) == (1, None)


def test_scores_that_are_all_alike_leave_no_interval():
    for scores in ([0.3], [0.3] * 50):
        figure = mean(scores)
        assert (figure.value, figure.low, figure.high) == (
            pytest.approx(0.3),
            None,
            None,
        )


def test_a_perplexity_beyond_a_float_is_told_as_a_loss():
    case = Case("x:1", answers=("word",))
    for loss, name, value in ((2.0, "perplexity", math.exp(2)), (800.0, "loss", 800)):
        replies = [Reply(logprobs=(-loss,), greedy=(False,))] * 2
        figures = METRICS["last-word"].figures([case] * 2, replies)
        assert figures[name].value == pytest.approx(value)
        assert set(figures) == {"acc", name}


CHOICES = ("a dog", "a cat", "two birds")


@pytest.mark.parametrize(
    ("answer", "option"),
    [
        ("B", 1),
        ("B.", 1),
        ("(C)", 2),
        ("C)", 2),
        ("B. a dog is not there, C", 1),
        ("The answer is B.", 1),
        ("The answer is: C", 2),
        ("A cat", 0),  # A letter is a letter in a short answer.
        ("A bird may be seen here", None),
        ("It is a cat, sitting", 1),
        ("a dog and a cat", None),
        ("A or B", None),
        ("D", None),
        ("", None),
        ("b", None),
    ],
)
def test_options_are_found_as_mmbench_finds_them(answer, option):
    assert find_option(answer, CHOICES) == option


def test_options_are_listed_by_letters():
    assert list_options(["x", "y"]) == "A. x\nB. y"


def test_overlap_is_what_boxes_share():
    assert overlap([0, 0, 10, 10], [0, 0, 10, 10]) == 1
    assert overlap([0, 0, 10, 10], [5, 0, 15, 10]) == pytest.approx(1 / 3)
    assert overlap([0, 0, 10, 10], [0, 5, 10, 10]) == 0.5
    assert overlap([0, 0, 1, 1], [2, 2, 3, 3]) == 0
    assert overlap([1, 1, 1, 1], [1, 1, 1, 1]) == 0


def test_exact_match_looks_at_neither_case_nor_punctuation():
    assert exact_match(" New York. ", ["NYC", "new york"])
    assert exact_match("U.S.", ["US"])
    assert not exact_match("York", ["New York"])


def test_wilsons_interval_is_the_textbooks():
    # Newcombe (1998), table I: 81 of 263.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20)[0] == pytest.approx(0, abs=1e-12)


def test_an_interval_of_a_mean_narrows_with_the_root_of_n():
    stream = np.random.default_rng(0)
    widths = []
    for n in (100, 10_000):
        figure = mean(stream.random(n))
        assert figure.low < figure.value < figure.high
        # The standard error of uniform numbers: 1 / sqrt(12 n).
        assert figure.high - figure.low == pytest.approx(
            3.92 / math.sqrt(12 * n), rel=0.15
        )
        widths.append(figure.high - figure.low)
    assert widths[0] / widths[1] == pytest.approx(10, rel=0.2)


def test_an_interval_is_a_function_of_the_scores():
    scores = np.array([0.0, 0.5, 1.0, 1.0])
    assert bootstrap(scores, np.mean) == bootstrap(scores, np.mean)


def test_a_share_knows_chance():
    figure = share([True, False, True, True], chance=0.25)
    assert (figure.value, figure.n, figure.chance) == (0.75, 4, 0.25)
    assert (figure.low, figure.high) == wilson(3, 4)
