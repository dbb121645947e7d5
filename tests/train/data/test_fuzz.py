"""Damaged files and rows of any kind end in one of our own errors, which names the file."""

import json
import random

import pytest

from mm1_mlx.errors import MM1Error

ROUNDS = 150


def damaged(data, draw):
    """The bytes, cut off, overwritten, or with some put in or taken out."""
    data = bytearray(data)
    kind = draw.randrange(4)
    if kind == 0:
        return bytes(data[: draw.randrange(len(data))])
    for _ in range(draw.randrange(1, 9)):
        place = draw.randrange(len(data))
        if kind == 1:
            data[place] = draw.randrange(256)
        elif kind == 2:
            data[place:place] = draw.randbytes(draw.randrange(1, 20))
        else:
            del data[place : place + draw.randrange(1, 20)]
    return bytes(data)


def fault(call, *arguments, **options):
    """The message of our own error that a call ends in, if it does; and its result."""
    try:
        return None, call(*arguments, **options)
    except MM1Error as error:
        return str(error), None


def use(make_batches, path):
    """How a file ends: every row prepared, or an error that names it."""
    message, batches = fault(make_batches, path, batch_size=1)
    if message is not None:
        assert path.name in message
        return "refused"
    ends = set()
    for position in range(min(len(batches.mixture), 12)):
        message, _ = fault(batches.prepare, [position])
        ends.add("used" if message is None else "bad row")
        assert message is None or (path.name in message and "\n" not in message)
    return "+".join(sorted(ends))


@pytest.fixture
def whole(write_lines, write_shard, write_parquet, pictures, tmp_path):
    """A file of each kind, as bytes."""
    rows = [
        {"image": name, "caption": f"picture {i}"} for i, name in enumerate(pictures)
    ]
    bytes_of = [(tmp_path / name).read_bytes() for name in pictures]
    members = [(f"{i}.png", data) for i, data in enumerate(bytes_of)]
    members += [(f"{i}.txt", b"a picture") for i in range(len(bytes_of))]
    table = [
        {"image": {"bytes": data, "path": "x"}, "caption": "a picture"}
        for data in bytes_of
    ]
    return {
        "rows.jsonl": write_lines(rows).read_bytes(),
        "shard.tar": write_shard(sorted(members)).read_bytes(),
        "rows.parquet": write_parquet(table).read_bytes(),
    }


@pytest.mark.parametrize("name", ["rows.jsonl", "shard.tar", "rows.parquet"])
def test_a_damaged_file_is_an_error_of_ours(name, whole, make_batches, tmp_path):
    path = tmp_path / name
    path.write_bytes(whole[name])
    assert use(make_batches, path) == "used"
    draw, ends = random.Random(name), set()
    for _ in range(ROUNDS):
        path.write_bytes(damaged(whole[name], draw))
        ends.add(use(make_batches, path))
    # The damage did reach what is read.
    assert len(ends) >= 2
    assert ends - {"used"}


@pytest.mark.parametrize("suffix", [".jsonl", ".tar", ".parquet"])
def test_random_bytes_are_an_error_of_ours(suffix, make_batches, tmp_path):
    draw = random.Random(suffix)
    path = tmp_path / f"noise{suffix}"
    for size in (0, 1, 2, 4, 8, 511, 512, 513, 1024, 5000):
        for _ in range(4):
            path.write_bytes(draw.randbytes(size))
            assert use(make_batches, path) in ("refused", "bad row")


VALUES = [
    *(None, True, 0, -1, 1e400, "", " ", "<image>", "a.png", "\ud800", "\0", "x" * 300),
    *([], {}, [[]], [{}], [None], ["<image>", 3], {"bytes": "x"}, {"type": "image"}),
    *({"from": "human", "value": "<image><image>"}, {"role": "assistant"}),
    *({"role": "user", "content": [{"type": "region", "box": [1, 2]}]}, "data:,"),
    *(
        {"user": 1},
        [{"role": "user", "content": None}, {"role": "assistant", "content": "x"}],
        [{"role": "user", "content": 3}, {"role": "assistant", "content": "x"}],
        [{"role": "user", "content": []}, {"role": "assistant", "content": "x"}],
        {"role": [], "content": {}},
        {"type": []},
        "../x",
        "data:image/png;",
    ),
    *({"type": "video", "video": "pictures"}, {"type": "text"}, {"url": "file:///x"}),
    *({"role": "assistant", "content": "x"}, {"from": "gpt", "value": "x"}),
]
KEYS = (
    *("image", "images", "file_name", "conversations", "messages", "texts", "parts"),
    *("question", "answer", "caption", "text", "role", "content", "type"),
)


def anything(draw, depth=0):
    """A JSON value of the words that rows are made of."""
    kind = draw.random()
    if depth < 3 and kind < 0.25:
        return [anything(draw, depth + 1) for _ in range(draw.randrange(4))]
    if depth < 3 and kind < 0.4:
        keys = draw.sample(KEYS, draw.randrange(4))
        return {key: anything(draw, depth + 1) for key in keys}
    return draw.choice(VALUES)


@pytest.mark.usefixtures("pictures")
def test_rows_of_any_values_are_an_error_of_ours(make_batches, write_lines):
    draw, ends = random.Random(7), set()
    rows = [
        json.dumps(
            {key: anything(draw) for key in draw.sample(KEYS, draw.randrange(5))}
        )
        for _ in range(1500)
    ]
    for first in range(0, len(rows), 12):
        path = write_lines(rows[first : first + 12])
        ends.add(use(make_batches, path))
    assert "bad row" in ends
