"""``KeyValueCache``: what is generated step by step is what one pass over whole samples gives."""

import pytest
import torch
from support.attention_ways import CHECKED, in_each_way
from support.contract import normal, refused

from onepeace_fast import KeyValueCache, Segments, relative_bias_attention

HEADS, DIM, PROMPTS = 2, 32, [[[66, 3, 4], [0, 2, 4]], [[66, 3, 4], [0, 0, 0]]]
# New tokens of each modality and sample, step after step.
STEPS = [[[1, 0, 1], [0, 1, 0]], [[0, 1, 2], [1, 0, 0]], [[1, 1, 0], [0, 1, 1]]]
ORDERS = {"causal": lambda place: place, "prefix": lambda place: max(0, place - 2)}


def segments(places, order):
    """Of tokens at these places of their samples, ``places[modality][sample]``; their codes are the places."""
    counts = torch.tensor([[len(of_sample) for of_sample in row] for row in places])
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), counts.flatten().cumsum(0)]).int()
    samples = counts.shape[1]
    cu_seqlens = torch.stack([bounds[m * samples : (m + 1) * samples + 1] for m in range(len(places))])
    code = torch.tensor([place for row in places for of_sample in row for place in of_sample], dtype=torch.int32)
    modality = torch.arange(len(places)).repeat_interleave(counts.sum(1)).int()
    orders = torch.tensor([order(place) for place in code.tolist()], dtype=torch.int32)
    return Segments(cu_seqlens, modality, code, torch.zeros_like(code, dtype=torch.bool), 70, orders)


def on(device, of):
    return Segments(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in of))


@in_each_way
@pytest.mark.parametrize("vectors", (0, 1, 2))
@pytest.mark.parametrize("name", ORDERS)
def test_generating_step_by_step_gives_what_the_whole_pass_gives(name, way, vectors):
    check(ORDERS[name], CHECKED[way], vectors)


@pytest.mark.gpu
@pytest.mark.filterwarnings("error:.*takes the slower path:RuntimeWarning")
@pytest.mark.parametrize("name", ORDERS)
def test_on_a_gpu_generating_step_by_step_gives_what_the_whole_pass_gives(name):
    check(ORDERS[name], torch.bfloat16, 2, "cuda")


def check(order, dtype, vectors, device="cpu"):
    """Samples grow at unlike rates, some not at all in a step."""
    modalities = max(vectors, 1)
    steps = [[row[:] for row in step][:modalities] for step in [PROMPTS[vectors < 2], *STEPS]]
    # A token's place counts those of its sample that came before, of all modalities.
    seen, places = [0] * 3, []
    for step in steps:
        of_step = [[[] for _ in range(3)] for _ in range(modalities)]
        for m, row in enumerate(step):
            for sample, count in enumerate(row):
                of_step[m][sample] = list(range(seen[sample], seen[sample] + count))
                seen[sample] += count
        places.append(of_step)
    of_whole = [[[i for step in places for i in step[m][s]] for s in range(3)] for m in range(modalities)]
    whole = on(device, segments(of_whole, order))
    rows = whole.code.shape[0]
    q, k, v = (normal(rows, HEADS, DIM, seed=seed).to(device, dtype) for seed in (1, 2, 3))
    bias = [normal(HEADS, 2 * 80 + 4, seed=4 + m).to(device, dtype) for m in range(vectors)]
    given = {"bias": bias, "code_offsets": [80] * vectors}
    expected = relative_bias_attention((q, k, v), **whole._asdict(), **given)
    cache = KeyValueCache(3, 70, HEADS, DIM, modalities=modalities, device=device, dtype=dtype)
    for of_step in places:
        new = on(device, segments(of_step, order))
        chosen = [
            int(whole.cu_seqlens[m, sample]) + of_whole[m][sample].index(place)
            for m, row in enumerate(of_step)
            for sample, of_sample in enumerate(row)
            for place in of_sample
        ]
        cache.append(k[chosen], v[chosen], new)
        out = relative_bias_attention((q[chosen], cache.k, cache.v), **new._asdict(), keys=cache.segments, **given)
        bound = {torch.bfloat16: 2e-2, torch.float32: 1e-5}.get(dtype, 1e-12)
        torch.testing.assert_close(out, expected[chosen], rtol=bound, atol=bound)
    assert torch.equal(cache.lengths, whole.cu_seqlens.diff(dim=1))


def test_what_does_not_fit_is_one_line():
    cache = KeyValueCache(2, 3, HEADS, 4, value_dim=5)
    new = segments([[[0, 1], [0]]], lambda place: place)
    k, v = torch.zeros(3, HEADS, 4), torch.zeros(3, HEADS, 5)
    refused("k", cache.append, k[..., 1:], v, new)
    refused("v", cache.append, k, k, new)
    refused("new.order", cache.append, k, v, new._replace(order=None))
    refused("new.cu_seqlens", cache.append, k, v, new._replace(cu_seqlens=new.cu_seqlens[:, 1:]))
    cache.append(k, v, new)
    refused("capacity", cache.append, k, v, new)
    for name in ("samples", "capacity", "modalities"):
        refused(name, KeyValueCache, **{"samples": 2, "capacity": 3, "heads": 1, "head_dim": 4, name: 0})
    assert cache.lengths.tolist() == [[2, 1]]


def refused_line(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def test_an_order_that_begins_again_and_rows_without_a_partner_are_refused_before_anything_is_stored():
    cache = KeyValueCache(2, 4, HEADS, 4)
    k = torch.ones(3, HEADS, 4)
    cache.append(k, k, segments([[[0, 1], [0]]], lambda place: place))
    before = [x.clone() for x in (cache.k, cache.v, cache.lengths, cache.segments.order)]
    again = segments([[[], [0]]], lambda place: place)._replace(order=torch.zeros(1, dtype=torch.int32))
    line = refused_line(lambda: cache.append(2 * k[:1], k[:2], again))
    assert line == "v: expected the 1 rows of new.code, got float32 [2, 2, 4] on cpu"
    line = refused_line(lambda: cache.append(2 * k[:1], k[:1], segments([[[0], []]], lambda place: place)))
    assert line == (
        "new.order: expected one that goes on from the cached rows' order, got a lower one; add what is cached to a "
        "plan's causal_order()"
    )
    after = (cache.k, cache.v, cache.lengths, cache.segments.order)
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    cache.append(k[:1], k[:1], again)  # the second sample has one row so far, which a row of the same order sees
    assert cache.lengths.tolist() == [[2, 2]]


def test_cls_tokens_are_refused_before_anything_is_stored():
    cache, k = KeyValueCache(2, 4, HEADS, 4), torch.ones(3, HEADS, 4)
    new = segments([[[0, 1], [0]]], lambda place: place)
    with_cls = new._replace(is_cls=torch.tensor([False, False, True]))
    line = refused_line(lambda: cache.append(k, k, with_cls))
    assert line == "new.is_cls: expected none, got CLS; attend to CLS without a cache"
    line = refused_line(lambda: cache.append(k, k, new._replace(is_cls=new.is_cls[1:])))
    assert line == "new.is_cls: expected one of each of 3 rows, got bool [2] on cpu"
    assert not cache.k.any() and not cache.lengths.any()


def test_inert_rows_are_not_stored():
    cache = KeyValueCache(1, 3, HEADS, 4)
    new = segments([[[0, 1]]], lambda place: place)
    inert_cls = torch.tensor([False, False, True, True])  # of rows that nothing reads
    longer = new._replace(code=torch.full((4,), 7, dtype=torch.int32), order=torch.zeros(4, dtype=torch.int32))
    longer = longer._replace(is_cls=inert_cls)
    cache.append(torch.ones(4, HEADS, 4), torch.ones(4, HEADS, 4), longer)
    assert cache.k[:, 0, 0].tolist() == cache.v[:, 0, 0].tolist() == [1, 1, 0, 0]
    assert cache.segments.order.tolist()[:2] == [0, 0] and cache.segments.code.tolist()[:3] == [7, 7, 7]
