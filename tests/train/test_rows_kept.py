"""Decoded rows of parquet files: how many bytes of a run, and that they are counted."""

import io

import pytest
from PIL import Image

from mm1_mlx.errors import ConfigError
from mm1_mlx.train.data import parquet as kept
from mm1_mlx.train.data.parquet import RowGroups
from mm1_mlx.train.job import Job


@pytest.fixture
def rows(tmp_path):
    """A parquet file of captions, five a group."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(buffer, "png")
    found = [
        {"image": {"bytes": buffer.getvalue()}, "caption": f"{i} red " * 400}
        for i in range(40)
    ]
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(found), path, row_group_size=5)
    return path


@pytest.fixture
def job(rows, write_folder, make_model, tmp_path):
    base = write_folder(tmp_path / "base", make_model())
    given = {
        "data": (str(rows),), "valid_share": 0.2, "steps": 1, "batch_size": 2,
        "micro_batches": 1, "truncate": True,
    }  # fmt: skip
    return Job(base, tmp_path / "run", "connector", given)


def test_what_is_learned_and_what_is_measured_by_are_kept_together(job):
    mixtures = job._mixture, job._measured
    sources = [s for m in mixtures for d in m.datasets for s in d.files._sources]
    assert len(sources) == 2
    assert all(source._groups is job._groups for source in sources)
    job.outlook()
    assert 0 < job._groups.nbytes <= job._groups.limit


def test_they_are_part_of_the_forecast(job, rows):
    # What is measured by is of the same file.
    assert job.held_out > 0
    groups = job._groups
    (size,) = groups.stated.values()
    assert size == groups.expected > 100_000
    with_rows = job.outlook().forecast["bytes"]
    groups.stated[rows] = 0
    assert with_rows - job.outlook().forecast["bytes"] == size
    groups.stated[rows] = groups.limit = 1 << 60
    with pytest.raises(ConfigError, match="rows"):
        job.outlook()


def test_a_small_machine_keeps_fewer(monkeypatch):
    for free, limit in ((1 << 40, 2 << 30), (4 << 30, 512 << 20), (None, 2 << 30)):
        monkeypatch.setattr(kept, "unswapped", lambda free=free: free)
        assert RowGroups().limit == limit
