"""A bias of all pairs is read back as the vector that it was made of, and only where it was made of one."""

import pytest
import torch
from layers import _formulas as formulas

from onepeace_fast import RelativeBias, dense_bias, shifted_windows
from onepeace_fast.dense_bias import dense_vector, full_segments, is_relative, window_parts
from onepeace_fast.relative_position import window_code_offset, window_codes

HEADS = 2
WINDOWS = {
    "series": (lambda: RelativeBias.t5(HEADS, 8, 10), (13,), False, 13),
    "one token": (lambda: RelativeBias.t5(HEADS, 8, 10), (1,), False, 1),
    "window": (lambda: RelativeBias.swin((3, 4), HEADS), (3, 4), False, None),
    "window and CLS": (lambda: RelativeBias.beit((3, 2), HEADS), (3, 2), True, None),
    "three axes": (lambda: RelativeBias.video_swin((2, 3, 2), HEADS), (2, 3, 2), False, None),
}


@pytest.fixture(params=WINDOWS)
def case(request):
    make, window, with_cls, length = WINDOWS[request.param]
    bias = make().double()
    torch.nn.init.normal_(bias.table)
    return bias, window, with_cls, length


def test_the_vector_of_a_dense_bias_is_the_one_that_it_was_made_of(case):
    bias, window, with_cls, length = case
    dense = bias.dense(length)
    assert torch.equal(dense_vector(dense, window, with_cls), bias.vector(length))
    assert window_code_offset(window) == bias.code_offset(length)


def test_the_vector_s_gradient_reaches_the_table_through_one_pair_of_each_distance(case):
    bias, window, with_cls, length = case
    dense = bias.dense(length)
    dense.retain_grad()
    vector = dense_vector(dense, window, with_cls)
    weight = torch.randn_like(vector)
    (gradient,) = torch.autograd.grad((bias.vector(length) * weight).sum(), bias.table)
    (vector * weight).sum().backward()
    torch.testing.assert_close(bias.table.grad, gradient, rtol=1e-12, atol=1e-12)
    entries = vector.shape[1] - (0 if with_cls else 3)
    assert (dense.grad != 0).sum() == HEADS * entries


def test_a_bias_is_relative_until_any_number_of_a_distance_with_several_pairs_is_another(case):
    bias, window, with_cls, length = case
    dense = bias.dense(length).detach()
    assert is_relative(dense, window, with_cls)
    index = formulas.window_index(window, with_cls)
    counts = index.flatten().bincount()
    for query in range(dense.shape[1]):
        for key in range(dense.shape[1]):
            other = dense.clone()
            other[-1, query, key] += 1
            alone = bool(counts[index[query, key]] == 1)
            assert bool(is_relative(other, window, with_cls)) == alone, (query, key)


def test_full_segments_have_the_window_s_codes_behind_each_cls():
    segments = full_segments(2, (2, 3), True, torch.device("cpu"))
    codes = window_codes((2, 3), (2, 3)).tolist()
    assert segments.cu_seqlens.tolist() == [[0, 7, 14]] and segments.cu_seqlens.dtype == torch.int32
    assert segments.code.tolist() == [0, *codes] * 2 and segments.code.dtype == torch.int32
    assert segments.is_cls.tolist() == ([True] + [False] * 6) * 2
    assert segments.modality.tolist() == [0] * 14 and segments.max_length == 7


def test_what_is_kept_from_inference_serves_gradients():
    dense_bias._standing_pairs.__wrapped__.cache_clear(), full_segments.__wrapped__.cache_clear()
    with torch.inference_mode():
        dense_vector(torch.randn(1, 5, 5), (5,))
        full_segments(1, (5,), False, torch.device("cpu"))
    cpu = torch.device("cpu")
    kept = [dense_bias._standing_pairs((5,), False, cpu), *full_segments(1, (5,), False, cpu)[:4]]
    assert not any(x.is_inference() for x in kept)
    dense = torch.randn(1, 5, 5, requires_grad=True)
    dense_vector(dense, (5,)).sum().backward()
    assert dense.grad.sum() == 9


@pytest.mark.parametrize("shift", [(0, 0), (1, 2), (1, 0)])
def test_parts_of_windows_are_the_segments_of_shifted_windows(shift):
    size, window = (4, 6), (2, 3)
    pairs = formulas.shifted_window_pairs(size, window, shift)
    # The rolled image's windows, by the tokens that they hold.
    tokens = torch.arange(24).view(size).roll([-s for s in shift], (0, 1))
    tokens = tokens.view(2, 2, 2, 3).transpose(1, 2).reshape(4, 6)
    hidden = ~torch.stack([pairs[row][:, row] for row in tokens])
    part, fits = window_parts(hidden, 4)
    assert fits
    order = (part + 4 * torch.arange(4)[:, None]).flatten().argsort(stable=True)
    windows = shifted_windows(size, window, shift)
    lengths = [n for n in (part + 4 * torch.arange(4)[:, None]).flatten().bincount().tolist() if n]
    assert sorted(lengths) == sorted(windows.lengths)
    got = set(map(tuple, (sorted(x.tolist()) for x in tokens.flatten()[order].split(lengths))))
    assert got == set(map(tuple, (sorted(x.tolist()) for x in windows.order.split(windows.lengths))))


def test_a_mask_that_is_not_one_of_parts_does_not_fit():
    alike = torch.zeros(1, 4, 4, dtype=torch.bool)
    causal = torch.ones(1, 4, 4).triu(1).bool()
    chain = (torch.arange(4)[:, None] - torch.arange(4)).abs().gt(1)[None]
    alone = ~torch.eye(4).bool()[None]
    assert window_parts(alike, 1)[1] and window_parts(alone, 4)[1]
    for hidden, most in ((causal, 4), (causal.mT, 4), (chain, 4), (alone, 3), (~alike, 4)):
        assert not window_parts(hidden, most)[1]
