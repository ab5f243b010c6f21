"""What ops promise, held against float64 and not their own reference: precision, which widths and what by default."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support import contract

from onepeace_fast.ops import gated_sub_ln, layer_norm, relative_bias_attention, routed_ffn

HALF = (torch.float16, torch.bfloat16)
ROWS, HEADS, HEAD_DIM = 12, 2, 16
WIDTH = HEADS * HEAD_DIM
OFFSETS = torch.tensor([0, 7, ROWS], dtype=torch.int32)


random = partial(contract.normal, seed=0)


def attention(qkv, **given):
    rows = torch.arange(qkv.shape[0], dtype=torch.int32)
    cu_seqlens = torch.tensor([[0, qkv.shape[0]]], dtype=torch.int32)
    return relative_bias_attention(
        qkv, cu_seqlens=cu_seqlens, modality=torch.zeros_like(rows), code=rows, is_cls=rows < 0, **given
    )


def ffn(z, **given):
    weights = [random(WIDTH, WIDTH, seed=seed, dtype=z.dtype) / WIDTH**0.5 for seed in range(1, 7)]
    norm = {"norm_weight": [random(WIDTH, seed=s, dtype=z.dtype) for s in (7, 8)]}
    norm["norm_bias"] = [random(WIDTH, seed=s, dtype=z.dtype) for s in (9, 10)]
    return routed_ffn(z, weights[:2], weights[2:4], weights[4:], None, offsets=OFFSETS, **norm, **given)


def assert_rounded_once(got, exact):
    """Half a last place of the exact value, and what float32 loses before."""
    assert got.isfinite().all()
    allowed = 0.51 * torch.finfo(got.dtype).eps * exact.abs() + 2e-6 * exact.abs().max()
    excess = ((got.double() - exact).abs() - allowed).max().item()
    assert excess <= 0, f"{excess:.3g} more than half a last place in {got.dtype}"


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_attention_s_scores_and_softmax_are_float32_s_in_half_precision(dtype):
    qkv = random(ROWS, 3, HEADS, HEAD_DIM, dtype=dtype)
    qkv[:, :2] *= 3  # sharp enough that a score's rounding shows
    q, k, v = qkv.double().permute(1, 2, 0, 3)
    exact = ((q @ k.transpose(1, 2)) / HEAD_DIM**0.5).softmax(-1) @ v
    assert_rounded_once(attention(qkv), exact.transpose(0, 1))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_gate_and_its_norm_are_float32_s_in_half_precision(dtype):
    u, v, weight, bias = (random(ROWS, WIDTH, seed=seed, dtype=dtype) for seed in range(4))
    exact = F.gelu(u.double()) * v.double()
    norms = [(weight[m].double(), bias[m].double()) for m in range(2)]
    exact = torch.cat([F.layer_norm(x, (WIDTH,), *norm) for x, norm in zip(exact.split([7, 5]), norms, strict=True)])
    got = gated_sub_ln(u, v, [weight[0], weight[1]], [bias[0], bias[1]], offsets=OFFSETS)
    assert_rounded_once(got, exact)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_norm_s_statistics_are_float32_s_in_half_precision(dtype):
    x = random(ROWS, WIDTH, dtype=dtype)
    weight, bias = (random(WIDTH, seed=seed, dtype=dtype) for seed in (1, 2))
    exact = F.layer_norm(x.double(), (WIDTH,), weight.double(), bias.double())
    assert_rounded_once(layer_norm(x, weight, bias), exact)


@pytest.mark.parametrize("op", [attention, ffn], ids=["attention", "FFN"])
def test_float64_stays_float64_under_autocast(op):
    x = random(ROWS, 3, HEADS, HEAD_DIM) if op is attention else random(ROWS, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        inside = op(x)
    assert inside.dtype == torch.float64 and torch.equal(inside, op(x))


def test_scores_are_scaled_by_the_root_of_the_heads_width_unless_that_is_said():
    qkv = random(ROWS, 3, HEADS, HEAD_DIM)
    default, said, other = attention(qkv), attention(qkv, scale=1 / math.sqrt(HEAD_DIM)), attention(qkv, scale=1.0)
    assert torch.equal(default, said) and not torch.equal(default, other)


@pytest.mark.parametrize("width", [16384, 16385])
def test_rows_of_at_most_16384_columns_are_taken(width):
    refused = ""
    try:
        out = layer_norm(random(1, width))
    except ValueError as error:
        refused = str(error)
    assert bool(refused) == (width > 16384), refused
    if not refused:
        assert out.shape == (1, width)


@pytest.mark.parametrize("op", ["gated_sub_ln", "routed_ffn"])
def test_epsilon_of_a_sub_layer_norm_is_a_hundred_thousandth_unless_that_is_said(op):
    """On rows whose variance is about as much."""
    weight, bias = [random(WIDTH)] * 2, [random(WIDTH, seed=1)] * 2
    if op == "routed_ffn":
        results = [ffn(0.05 * random(ROWS, WIDTH), **eps) for eps in ({}, {"eps": 1e-5}, {"eps": 1e-6})]
    else:
        u, v = 3e-3 * random(ROWS, WIDTH), 1 + 3e-3 * random(ROWS, WIDTH, seed=2)
        results = [gated_sub_ln(u, v, weight, bias, offsets=OFFSETS, **e) for e in ({}, {"eps": 1e-5}, {"eps": 1e-6})]
    default, said, smaller = results
    assert torch.equal(default, said)
    assert not torch.allclose(default, smaller, rtol=1e-2)
