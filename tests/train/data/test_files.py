"""Files are rows by number: JSONL, tar shards, parquet, and folders of them."""

import json
import os
import tarfile

import pytest

from mm1_mlx.errors import DataError
from mm1_mlx.train.data.files import Files, find_files
from mm1_mlx.train.data.lines import JsonLines
from mm1_mlx.train.data.parquet import Parquet, RowGroups
from mm1_mlx.train.data.shards import Shard

# Lines


def test_every_line_is_a_row_that_knows_its_number(write_lines):
    rows = JsonLines(write_lines([{"text": "a"}, "", "  ", {"text": "é\u2028"}, "\t"]))
    assert len(rows) == 2
    assert [rows[i].values for i in range(2)] == [{"text": "a"}, {"text": "é\u2028"}]
    assert [rows[i].origin.rpartition(":")[2] for i in range(2)] == ["1", "4"]


@pytest.mark.parametrize(
    ("data", "texts"),
    [
        (b"", []),
        (b"\n\n", []),
        (b'{"text": 1}', [1]),
        (b'\xef\xbb\xbf{"text": 1}\r\n\r\n{"text": 2}\r\n', [1, 2]),
        (b"\xef\xbb\xbf\n" + b'{"text": 2}', [2]),
    ],
)
def test_ends_of_lines_and_marks_of_the_encoding_are_no_rows(tmp_path, data, texts):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    rows = JsonLines(path)
    assert [rows[i].values["text"] for i in range(len(rows))] == texts


def test_chunks_of_the_index_do_not_cut_rows(write_lines, monkeypatch):
    texts = [f"{'x' * (i % 7)}" for i in range(50)]
    path = write_lines([{"text": text} for text in texts])
    monkeypatch.setattr("mm1_mlx.train.data.lines._CHUNK", 5)
    rows = JsonLines(path)
    assert [rows[i].values["text"] for i in range(len(rows))] == texts


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{broken", r"rows.jsonl:2: expected a JSON object, got '\{broken"),
        (
            '{"a": 1, "b" 2}',
            r"""rows.jsonl:2: expected a JSON object, got '\{"a": 1, "b" 2}.*'; """
            "Expecting ':' delimiter at column 14",
        ),
        ("[1, 2]", "jq -c"),
        ("7", "expected a JSON object, got '7"),
        ("[" * 100_000, "expected a JSON object"),
        ('{"a": ' + "1" * 5000 + "}", "expected a JSON object"),
    ],
)
def test_a_line_that_is_no_object_is_named(write_lines, line, reason):
    rows = JsonLines(write_lines([{"text": "a"}, line]))
    assert rows[0].values == {"text": "a"}
    with pytest.raises(DataError, match=reason):
        rows[1]


def test_a_line_in_another_encoding_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"text": "é"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match="jsonl:1: not UTF-8; convert the file"):
        JsonLines(path)[0]


def test_a_file_that_was_cut_meanwhile_is_named(write_lines):
    path = write_lines([{"text": "a"}, {"text": "b"}])
    rows = JsonLines(path)
    os.truncate(path, 16)
    with pytest.raises(DataError, match="jsonl:2: the file has been cut"):
        rows[1]


def test_a_line_without_an_end_is_not_read(write_lines, monkeypatch):
    rows = JsonLines(write_lines([{"text": "a" * 100}]))
    monkeypatch.setattr("mm1_mlx.train.data.lines.MAX_ROW_BYTES", 50)
    with pytest.raises(DataError, match="the line has 113 bytes, expected at most 50"):
        rows[0]


def test_a_line_of_very_many_values_is_refused(write_lines):
    rows = JsonLines(write_lines(['{"text": "x", "a": [' + "[]," * 2_000_000 + "[]]}"]))
    with pytest.raises(DataError, match="more than 4,000,000 values"):
        rows[0]


# Shards


def test_members_of_one_name_are_a_row(write_shard):
    files = [
        ("a/001.jpg", b"one"),
        ("a/001.txt", b"ein Text "),
        ("a/001.cls", b"7"),
        ("a/002.json", json.dumps({"caption": "c", "image": "x"}).encode()),
        ("a/002.1.png", b"second"),
        ("a/002.10.png", b"third"),
        ("a/002.0.PNG", b"first"),
        ("._a", b"what macOS adds"),
        ("a/._002.png", b"what macOS adds"),
        ("a/003.txt", b"text alone"),
    ]
    rows = Shard(write_shard(files))
    assert [rows[i].values for i in range(len(rows))] == [
        {"caption": "ein Text", "images": [b"one"]},
        {"caption": "c", "images": [b"first", b"second", b"third"]},
        {"text": "text alone"},
    ]
    assert rows[1].origin.endswith("shard.tar:a/002")


def test_names_that_need_a_header_of_their_own_are_read(write_shard):
    name = f"{'long' * 60}/{'name' * 30}"
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        rows = Shard(write_shard([(f"{name}.txt", b"text")], format=kind))
        assert rows[0].values == {"text": "text"}
        assert rows[0].origin.endswith(name)


def test_two_members_of_one_ending_are_named(write_shard):
    rows = Shard(write_shard([("2.jpg", b""), ("2.JPG", b""), ("2.txt", b"a star")]))
    with pytest.raises(DataError, match=r"two members of the row end with 'jpg'; give"):
        rows[0]


def test_a_row_without_text_is_named(write_shard):
    rows = Shard(write_shard([("1.jpg", b""), ("1.cls", b"3")]))
    with pytest.raises(DataError, match=r"shard.tar:1: holds \['cls', 'jpg'\], exp"):
        rows[0]


def test_a_shard_that_is_cut_off_anywhere_is_refused(write_shard):
    path = write_shard([(f"{i}.txt", b"x" * 700) for i in range(3)])
    whole = path.read_bytes()
    # 3 members of a header and 700 bytes in blocks of 512.
    for size in (1, 511, 700, 1536, 1600, 2500, 4607):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"shard.tar (is|cannot be)"):
            Shard(path)
    path.write_bytes(whole)
    assert len(Shard(path)) == 3


def test_a_shard_that_leads_back_is_refused(write_shard):
    path = write_shard([("0000.txt", b"cat"), ("0001.txt", b"")])
    content = bytearray(path.read_bytes())
    second = content[1024:1536]
    # A size of less than nothing, in the form that large ones have, and its checksum.
    second[124:136] = (-512 % 256**12).to_bytes(12, "big")
    second[148:156] = b" " * 8
    second[148:156] = b"%06o\0 " % sum(second)
    content[1024:1536] = second
    path.write_bytes(content)
    with pytest.raises(DataError, match="is damaged"):
        Shard(path)


def test_a_compressed_shard_is_refused_with_the_way_out(write_shard, tmp_path):
    import gzip

    packed = tmp_path / "packed.tar"
    packed.write_bytes(gzip.compress(write_shard([("1.txt", b"x")]).read_bytes()))
    with pytest.raises(DataError, match=r"is compressed \(gzip\).* unpack it to a pla"):
        Shard(packed)


# Parquet


def test_rows_of_all_groups_are_read(write_parquet):
    rows = Parquet(write_parquet([{"text": str(i)} for i in range(8)]), RowGroups())
    assert rows.blocks.tolist() == [3, 3, 2]
    assert [rows[i].values["text"] for i in range(len(rows))] == list("01234567")
    assert rows[7].origin.endswith("rows.parquet:8")


def test_few_groups_of_all_files_are_kept(write_parquet):
    groups = RowGroups()
    files = [
        Parquet(
            write_parquet([{"text": f"{k}{i}"} for i in range(9)], f"{k}.parquet", 1),
            groups,
        )
        for k in range(3)
    ]
    for _ in range(2):
        for k, rows in enumerate(files):
            for i in range(9):
                assert rows[i].values["text"] == f"{k}{i}"
                assert len(groups) <= 5


def test_groups_of_all_data_sets_are_kept_up_to_so_many_bytes(
    write_parquet, open_data, monkeypatch
):
    names = [
        write_parquet(
            [{"text": f"{k} {i:04}" * 100} for i in range(40)], f"{k}.parquet", 5
        ).name
        for k in range(3)
    ]
    for limit in (1 << 30, 9000):
        monkeypatch.setattr("mm1_mlx.train.data.parquet.KEPT_BYTES", limit)
        mixture = open_data(*names)
        sources = [s for data in mixture.datasets for s in data.files._sources]
        groups = sources[0]._groups
        assert all(source._groups is groups for source in sources)
        texts, most = [], 0
        for i in range(2 * len(mixture)):
            texts.append(mixture[i].turns[-1][1][-1])
            most = max(most, len(groups))
            assert groups.nbytes <= limit
        assert len({*texts}) == 120
        # As many of each as are mixed and the next, or what 9000 bytes hold.
        assert most == (15 if limit > 9000 else 2)


def test_a_text_that_repeats_is_held_once(write_parquet):
    pyarrow = pytest.importorskip("pyarrow")
    text = "x" * 20_000
    rows = [
        {"text": text, "messages": [{"content": text, "n": [i]}]} for i in range(2000)
    ]
    path = write_parquet(rows, group=2000)
    assert path.stat().st_size < 40_000
    files, before = Files([path]), pyarrow.total_allocated_bytes()
    values = [files[i].values for i in (0, 1234, 1999)]
    # 80 MB, unfolded.
    assert pyarrow.total_allocated_bytes() - before < 4_000_000
    assert values == [rows[i] for i in (0, 1234, 1999)]


@pytest.mark.parametrize("limit", [10_000, 39_000])
def test_a_row_group_of_too_many_bytes_is_refused(write_parquet, monkeypatch, limit):
    monkeypatch.setattr("mm1_mlx.train.data.parquet.MAX_GROUP_BYTES", limit)
    path = write_parquet([{"text": f"{i:020}"} for i in range(1500)], group=1500)
    # By what it says of itself, or by what it holds.
    with pytest.raises(
        DataError,
        match=r"rows.parquet:1: row group 0 has more than .* GB; write the file again",
    ):
        Files([path])[0]


@pytest.mark.parametrize("kind", ["list", "struct", "map", "view", "nested", "small"])
def test_a_row_of_more_bytes_than_memory_has_room_for_is_refused(
    tmp_path, monkeypatch, kind
):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    big, text = "x" * 1000, pyarrow.string()
    # The same text in a list's every place: a few bytes in the file and while folded.
    values, made = {
        "list": ([big] * 100, pyarrow.list_(text)),
        "struct": ({"a": [big] * 100}, pyarrow.struct({"a": pyarrow.list_(text)})),
        "map": ([(str(i), big) for i in range(100)], pyarrow.map_(text, text)),
        "view": ([big] * 100, pyarrow.list_(pyarrow.string_view())),
        "nested": (
            [[[big] * 10]] * 10,
            pyarrow.list_(pyarrow.list_(pyarrow.list_(text))),
        ),
        "small": ([0] * 1600, pyarrow.list_(pyarrow.int8())),
    }[kind]
    # Its neighbours do not count.
    column = pyarrow.array([values[:1] if kind != "struct" else {}, values, None], made)
    path = tmp_path / "rows.parquet"
    folds = kind != "view"
    parquet.write_table(pyarrow.table({"a": column}), path, use_dictionary=folds)
    rows = Parquet(path, RowGroups())
    assert rows[1].values
    monkeypatch.setattr("mm1_mlx.train.data.parquet.MAX_ROW_BYTES", 99_000)
    assert all(rows[i].values for i in (0, 2))
    with pytest.raises(DataError, match=r"rows.parquet:2: the row has \d+ bytes, exp"):
        rows[1]


def test_without_pyarrow_the_extra_is_named(write_parquet, monkeypatch):
    path = write_parquet([{"text": "a"}])
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match=r'pip install "mm1-mlx\[parquet\]" to read it'):
        Parquet(path, RowGroups())


# Folders


def test_a_folder_of_splits_is_read_as_its_train_split(tmp_path, write_lines):
    for name in ("train-00001-of-2", "train-00000-of-2", "test-00000-of-1"):
        write_lines([{"text": name}], f"set/data/{name}.jsonl")
    write_lines([], "set/notes.md")
    found = find_files(tmp_path / "set")
    assert [p.stem for p in found] == ["train-00000-of-2", "train-00001-of-2"]
    assert [p.stem for p in find_files(tmp_path / "set", "test")] == ["test-00000-of-1"]
    with pytest.raises(DataError, match=r"set holds no split 'dev', its files are \["):
        find_files(tmp_path / "set", "dev")
    # What is of no split is not left out.
    extra = write_lines([{"text": "x"}], "set/extra.jsonl")
    assert extra in find_files(tmp_path / "set")


def test_a_folder_of_tests_is_not_learned_from(tmp_path, write_lines):
    for name in ("test-00000-of-1", "validation"):
        write_lines([{"text": name}], f"set/{name}.jsonl")
    with pytest.raises(
        DataError, match=r"holds no split 'train'.* name another in a m"
    ):
        find_files(tmp_path / "set")


def test_a_folder_of_shards_and_a_pattern_are_read_in_order(tmp_path, write_lines):
    for i in (2, 0, 1):
        write_lines([{"text": str(i)}, {"text": str(i)}], f"set/part{i}.jsonl")
    found = find_files(tmp_path / "set")
    assert found == find_files(tmp_path / "set" / "part*.jsonl")
    rows = Files(found)
    assert [rows[i].values["text"] for i in range(len(rows))] == list("001122")
    assert rows.blocks is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("none.jsonl", "does not exist; give a file, a folder or a pattern"),
        ("**x/none*", "does not exist; give a file, a folder or a pattern"),
        ("empty", "empty holds no data files, expected .jsonl, .ndjson, .tar, .parq"),
        ("rows.json", "is none of .jsonl.* write one row a line: jq -c"),
        ("rows.tar.gz", "is none of .*; unpack it first"),
        ("rows.xyz", "is none of .*; convert it to one of them"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, name, reason):
    (tmp_path / "empty").mkdir()
    for file in ("rows.json", "rows.tar.gz", "rows.xyz"):
        (tmp_path / file).touch()
    with pytest.raises(DataError, match=reason):
        find_files(tmp_path / name)


def test_blocks_of_several_files_are_joined(write_parquet, write_lines):
    rows = Files(
        [
            write_parquet([{"text": "p"}] * 7, "a.parquet"),
            write_lines([{"text": "l"}] * 1500, "b.jsonl"),
        ]
    )
    assert rows.blocks.tolist() == [3, 3, 1, 1000, 500]


def test_an_identity_tells_files_apart(write_lines):
    identities = {
        Files([write_lines([{"text": text}] * count)]).identity()
        for text, count in (("a", 2), ("b", 2), ("a", 3))
    }
    assert len(identities) == 3
    again = Files([write_lines([{"text": "a"}] * 3)]).identity()
    assert again in identities


def test_an_identity_is_of_all_lines(write_lines):
    rows = [{"text": f"{i:100}"} for i in range(9000)]
    whole = Files([write_lines(rows)]).identity()
    assert Files([write_lines(rows)]).identity() == whole
    rows[4500] = {"text": f"{-1:100}"}
    assert Files([write_lines(rows)]).identity() != whole
