"""Files of embeddings in parts: whole after a kill or on a full disk, and of one model."""

import subprocess
import sys

import numpy
import pytest
import torch
from data._refused import refused

pytest.importorskip("pyarrow")

from onepeace_fast.embedding import store
from onepeace_fast.embedding.store import Identity, Item, Parts, reading, rows_of

ITEMS = [Item("text", f"a {n}", n + 2) for n in range(10)]
ROWS = torch.randn(10, 6, generator=torch.Generator().manual_seed(1))
WHO = Identity({"text": "ab", "tokenizer": "cd"})


def content(path):
    with reading(path) as (file, identity):
        blocks = [*rows_of(file)]
    items = [item for block, _ in blocks for item in block]
    return items, numpy.concatenate([rows for _, rows in blocks]), identity


def test_parts_become_one_file_with_what_is_wanted_and_go(tmp_path):
    out = tmp_path / "all.parquet"
    Parts(out, WHO).add(ITEMS[:4], ROWS[:4])
    parts = Parts(out, WHO)  # as after a kill
    assert parts.done == {("text", f"a {n}") for n in range(4)}
    parts.add(ITEMS[4:], ROWS[4:])
    assert sorted(path.name for path in parts.folder.iterdir()) == ["000000.parquet", "000001.parquet"]
    wanted = [Item("text", "a 8", 77), *ITEMS[1:6]]
    assert parts.finish(wanted) == 6 and [*tmp_path.iterdir()] == [out]
    items, rows, identity = content(out)
    assert items == [*ITEMS[1:6], Item("text", "a 8", 77)]
    numpy.testing.assert_array_equal(rows, ROWS[[1, 2, 3, 4, 5, 8]].numpy())
    assert identity == WHO
    refused(lambda: Parts(out, WHO), out, "taken")


def test_a_part_never_takes_anothers_place(tmp_path):
    parts = Parts(tmp_path / "all.parquet", WHO)
    parts.add(ITEMS[:2], ROWS[:2])
    parts.add(ITEMS[2:4], ROWS[2:4])
    (parts.folder / "000000.parquet").unlink()
    parts = Parts(tmp_path / "all.parquet", WHO)
    parts.add(ITEMS[4:5], ROWS[4:5])
    assert parts.finish(ITEMS) == 3


@pytest.mark.parametrize("name", ["text", "tokenizer"])
def test_parts_of_another_model_are_refused(tmp_path, name):
    Parts(tmp_path / "all.parquet", WHO).add(ITEMS, ROWS)
    other = Identity({**WHO.digests, name: "other", "image": "new"})
    assert WHO.difference(other) == name and WHO.difference(Identity({"image": "new"})) is None
    refused(lambda: Parts(tmp_path / "all.parquet", other), tmp_path, f"{name} differs")


def test_what_are_no_embeddings_is_refused(tmp_path):
    import pyarrow
    from pyarrow import parquet

    def opened(path):
        with reading(path):
            pass

    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "other.parquet")
    for name in ("none.parquet", "broken.parquet", "other.parquet"):
        refused(lambda name=name: opened(tmp_path / name), tmp_path / name)
    refused(lambda: Parts(tmp_path / "none" / "all.parquet", WHO), tmp_path / "none")


FULL = """
import resource, signal, sys, torch
from pathlib import Path
from onepeace_fast.embedding.store import Identity, Item, Parts
parts = Parts(Path(sys.argv[1]), Identity({"text": "ab"}))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
parts.add([Item("text", "a", 1)], torch.randn(1, 8))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    parts.add([Item("text", str(n), n) for n in range(9000)], torch.randn(9000, 8))
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_where_the_disk_is_full_nothing_is_half_written(tmp_path):
    out = tmp_path / "all.parquet"
    done = subprocess.run([sys.executable, "-c", FULL, out], capture_output=True, text=True, check=True)
    path = tmp_path / "all.parquet.parts" / "000001.parquet"
    assert done.stdout.startswith(f"{path}: expected room for a file, got an error"), done.stdout + done.stderr
    assert done.stdout.count("\n") == 1
    assert [one.name for one in path.parent.iterdir()] == ["000000.parquet"]


def test_a_failure_of_any_kind_while_writing_leaves_no_file(tmp_path):
    def blocks():
        yield ITEMS, ROWS.numpy()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store._write(tmp_path / "all.parquet", blocks(), 6, WHO)
    assert not (tmp_path / "all.parquet").exists()
