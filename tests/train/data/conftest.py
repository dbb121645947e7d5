"""Small data sets of every kind of file, with drawn pictures."""

import io
import json
import tarfile
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from mm1_mlx.train.data.batches import Batches
from mm1_mlx.train.data.mixture import open_mixture

COLOURS = ("red", "blue", "lime", "white", "black", "yellow")


@dataclass(frozen=True)
class Run:
    batch_size: int = 2
    micro_batches: int = 1
    max_length: int = 200
    truncate: bool = False
    packing: bool = False
    skip_bad: bool = False


@pytest.fixture
def make_run():
    """A function: what of a run batches depend on, some fields as given."""
    return Run


@pytest.fixture
def png():
    """A function: a picture's bytes."""

    def png(colour="red", size=(20, 16), kind="PNG"):
        buffer = io.BytesIO()
        Image.new("RGB", size, colour).save(buffer, kind)
        return buffer.getvalue()

    return png


@pytest.fixture
def pictures(tmp_path, png):
    """The names of one picture a colour, in the folder of the data."""
    (tmp_path / "pictures").mkdir()
    names = []
    for colour in COLOURS:
        name = f"pictures/{colour}.png"
        (tmp_path / name).write_bytes(png(colour))
        names.append(name)
    return names


@pytest.fixture
def write_lines(tmp_path):
    """A function: a JSONL file of rows, strings as they are."""

    def write_lines(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("".join(f"{line}\n" for line in lines))
        return path

    return write_lines


@pytest.fixture
def write_shard(tmp_path):
    """A function: a tar file of (name, bytes)."""

    def write_shard(files, name="shard.tar", **options):
        path = tmp_path / name
        with tarfile.open(path, "w", **options) as tar:
            for member, data in files:
                header = tarfile.TarInfo(member)
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
        return path

    return write_shard


@pytest.fixture
def write_parquet(tmp_path):
    """A function: a parquet file of rows, so many a group."""

    def write_parquet(rows, name="rows.parquet", group=3):
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
        return path

    return write_parquet


@pytest.fixture
def open_data(tmp_path):
    """A function: the mixture of what is named, from the data's folder."""

    def open_data(*names, **options):
        return open_mixture([str(name) for name in names], root=tmp_path, **options)

    return open_data


@pytest.fixture
def make_batches(open_data, tiny_config, train_tokenizer):
    """A function: batches of what is named, the run's fields as given."""

    def make_batches(
        *names, config=tiny_config, threads=2, data=None, more=None, **run
    ):
        mixture = open_data(*names, **(data or {}))
        return Batches(
            mixture,
            config,
            train_tokenizer,
            Run(**run),
            threads=threads,
            **(more or {}),
        )

    return make_batches


@pytest.fixture
def same_batch():
    """A function: two batches are equal, pictures and all."""

    def same_batch(one, other):
        assert np.array_equal(one.tokens, other.tokens)
        assert np.array_equal(one.learned, other.learned)
        assert one.spans == other.spans
        assert one.lengths == other.lengths
        assert one.segments == other.segments
        assert [p.digest for p in one.pictures] == [p.digest for p in other.pictures]

    return same_batch
