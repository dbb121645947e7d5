"""Before a run begins: how many rows, how long, and what is learned of one of them."""

import pytest

from mm1_mlx.errors import DataError
from mm1_mlx.train.data.preview import preview


@pytest.fixture
def batches(make_batches, write_lines, pictures):
    write_lines([{"text": "Once upon a time."}] * 3, "texts.jsonl")
    rows = [{"image": pictures[0], "question": "What?", "answer": "red"}] * 5
    write_lines([*rows, "{"], "asked.jsonl")
    return make_batches("texts.jsonl:1", "asked.jsonl:3", skip_bad=True)


def test_a_preview_counts_what_batches_hold(batches, train_tokenizer):
    made = preview(batches, train_tokenizer, 100)
    assert made.sampled == 9
    assert made.rows == {"texts.jsonl": 3, "asked.jsonl": 6}
    assert made.shares == {"texts.jsonl": 0.25, "asked.jsonl": 0.75}
    prepared = batches.prepare(range(9))
    lengths = sorted(len(each.rows[0].tokens) for each in prepared)
    assert (made.tokens.least, made.tokens.most) == (lengths[0], lengths[-1])
    assert made.tokens.middle == lengths[4]
    assert (made.pictures.least, made.pictures.most) == (0, 1)
    assert (made.image_tokens.least, made.image_tokens.most) == (0, 4)
    learned = sum(sum(each.rows[0].learned) for each in prepared)
    assert made.learned == pytest.approx(learned / sum(lengths))
    assert made.skipped == 1
    assert "asked.jsonl:6" in made.bad[0]


def test_a_row_is_shown_with_what_is_learned(make_batches, write_lines, pictures):
    rows = [{"image": pictures[0], "question": "What?", "answer": "red"}]
    batches = make_batches(write_lines(rows))
    made = preview(batches, batches._tokenizer)
    assert made.shown == (
        (False, "USER: "),
        (False, "<picture 1: 4 tokens>"),
        (False, "\nWhat? ASSISTANT:"),
        (True, " red</s>"),
    )
    text = str(made)
    assert "USER: <picture 1: 4 tokens>\nWhat? ASSISTANT:[[ red</s>]]" in text
    assert "rows.jsonl:1, what is learned in [[ ]]:" in text
    assert "1 rows  100.0% of the mixture" in text
    assert "bad rows" not in text


def test_bad_rows_are_shown(batches, train_tokenizer):
    text = str(preview(batches, train_tokenizer))
    assert "1 bad rows were passed over:" in text
    assert "asked.jsonl:6: expected a JSON object" in text


def test_a_bad_row_ends_a_preview_unless_they_are_passed_over(
    make_batches, write_lines, train_tokenizer
):
    batches = make_batches(write_lines(["{"]))
    with pytest.raises(DataError, match=r"rows.jsonl:1: expected a JSON object"):
        preview(batches, train_tokenizer)
