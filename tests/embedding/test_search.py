"""The nearest items by all cosines and by an index, fused queries, and the page."""

import pytest
import torch
import torch.nn.functional as F
from data._refused import refused
from models.test_process_defaults import DEFAULTS, same_under

pytest.importorskip("pyarrow")

from onepeace_fast.embedding import Embeddings, search
from onepeace_fast.embedding.page import write_page
from onepeace_fast.embedding.search import Hit, combine, nearest, nearest_by_index
from onepeace_fast.embedding.store import Identity, Item, Parts

KINDS = ("text", "image", "audio")
ITEMS = [Item(KINDS[n % 3], f"/files/item {n}", n) for n in range(60)]


def rows(count=60, seed=0):
    return F.normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.fixture
def path(tmp_path):
    parts = Parts(tmp_path / "all.parquet", Identity({}))
    parts.add(ITEMS, rows())
    parts.finish(ITEMS)
    return parts.out


def brute(query, count, kinds=KINDS):
    scores = rows() @ query
    order = [n for n in scores.argsort(descending=True).tolist() if ITEMS[n].modality in kinds][:count]
    return [ITEMS[n] for n in order], scores[order]


@pytest.mark.parametrize("block", [7, 1000])
@pytest.mark.parametrize("kinds", [KINDS, ("image",)])
def test_the_nearest_are_those_with_the_largest_cosines(path, block, kinds, monkeypatch):
    monkeypatch.setattr(search, "BLOCK", block)
    query = rows(1, 5)[0]
    items, scores = brute(query, 9, kinds)
    found = nearest(path, query, 9, kinds)
    assert [hit.item for hit in found] == items
    torch.testing.assert_close(torch.tensor([hit.score for hit in found]), scores)
    assert len(nearest(path, query, 500, kinds)) == (60 if kinds == KINDS else 20)


@DEFAULTS
def test_the_nearest_are_the_same_whatever_the_defaults_are(path, value):
    query = rows(1, 5)[0]
    same_under(value, lambda: {"": nearest(path, query, 9)})


def test_of_equal_items_the_first_in_the_file_stands_first(tmp_path):
    parts = Parts(tmp_path / "same.parquet", Identity({}))
    parts.add(ITEMS, rows(1).expand(60, 8))
    parts.finish(ITEMS)
    assert [hit.item for hit in nearest(parts.out, rows(1)[0], 5)] == ITEMS[:5]


@pytest.mark.parametrize("kinds", [KINDS, ("image", "audio")])
def test_an_index_finds_the_same_and_is_kept(path, tmp_path, kinds):
    pytest.importorskip("faiss")
    query, index = rows(1, 5)[0], tmp_path / "all.faiss"
    items, scores = brute(query, 9, kinds)
    for _ in range(2):
        found = nearest_by_index(path, index, query, 9, kinds)
        assert [hit.item for hit in found] == items
        torch.testing.assert_close(torch.tensor([hit.score for hit in found]), scores)
    made = index.stat().st_mtime_ns
    nearest_by_index(path, index, query, 9, kinds)
    assert index.stat().st_mtime_ns == made


def test_another_or_older_index_is_refused(path, tmp_path):
    pytest.importorskip("faiss")
    import os

    index = tmp_path / "all.faiss"
    index.write_bytes(b"nothing")
    refused(lambda: nearest_by_index(path, index, rows(1)[0], 3), index)
    index.unlink()
    nearest_by_index(path, index, rows(1)[0], 3)
    os.utime(index, ns=(0, path.stat().st_mtime_ns - 1))
    refused(lambda: nearest_by_index(path, index, rows(1)[0], 3), index, "remove it")


def test_a_query_of_another_size_is_refused(path):
    refused(lambda: nearest(path, torch.ones(9), 3), path, "9 numbers")


def test_a_query_of_several_is_the_sum_at_length_1():
    found = combine(Embeddings(text=rows(2), audio=rows(1, 9)))
    total = rows(2).sum(0) + rows(1, 9)[0]
    torch.testing.assert_close(found, total / total.norm())
    refused(lambda: combine(Embeddings()), "query: expected at least one")


def test_the_page_shows_pictures_players_and_texts_and_escapes_them(tmp_path):
    pytest.importorskip("jinja2")
    hits = [
        Hit(0.91, Item("image", "/files/a b.png", 1)),
        Hit(0.5, Item("audio", "/files/c#.wav", 2)),
        Hit(-0.25, Item("text", "<b>bold</b>", 3)),
    ]
    write_page(tmp_path / "found.html", {"text": ["a & b"], "image": ["/files/q.png"]}, hits)
    page = (tmp_path / "found.html").read_text()
    for part in (
        'src="file:///files/a%20b.png"', '<audio controls preload="none" src="file:///files/c%23.wav"',
        "&lt;b&gt;bold&lt;/b&gt;", "a &amp; b", 'src="file:///files/q.png"', "0.910", "-0.250", "the sum of",
    ):  # fmt: skip
        assert part in page, part
    assert "<b>bold" not in page and page.index("0.910") < page.index("0.500") < page.index("-0.250")
    assert [one.name for one in tmp_path.iterdir()] == ["found.html"]
