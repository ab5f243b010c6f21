"""``relative_bias_attention`` by the CUDA kernel at the model's sizes; all of it needs a GPU."""

import warnings
from itertools import pairwise

import pytest
import torch

from onepeace_fast import RoutePlan, cuda_extension, relative_bias_attention
from onepeace_fast.ops._library import force_kernels
from onepeace_fast.relative_position import (
    grid_code_offset,
    grid_codes,
    grid_table_rows,
    series_index,
    series_vector_index,
)
from onepeace_fast.tolerance import HALF, assert_within_rule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda_extension.extension() is None, reason="the CUDA extension is not built"),
]
HEADS, HEAD_DIM, REPEATS = 4, 64, 50
LENGTHS = {
    72: {"text": [72, 5, 33]},
    257: {"image": [257, 257]},
    329: {"text": [72, 9], "image": [257, 257]},
    750: {"audio": [750, 49]},
    822: {"text": [72, 20], "audio": [750, 300]},
    1025: {"image": [1025, 1025]},
}


def plan_of(lengths, device="cuda", **keywords):
    """A plan whose images are whole square grids."""
    side = int(max(lengths.get("image", [0])) ** 0.5)
    codes = {"image": grid_codes(side, side).to(device)} if side else {}
    offsets = {"image": grid_code_offset(side)} if side else {}
    return RoutePlan.from_lengths(lengths, device=device, codes=codes, code_offsets=offsets, **keywords)


def vectors_of(plan, lengths, device="cuda"):
    """Random vectors of each modality, [heads, entries], float32."""
    made = []
    for name, offset in zip(plan.modalities, plan.code_offsets, strict=True):
        side = int(max(lengths[name]) ** 0.5)
        rows = grid_table_rows(side) if name == "image" else 2 * 256 - 1 + 3
        table = torch.randn(rows, HEADS, device=device)
        entries = torch.arange(rows) if name == "image" else series_vector_index(series_index(256), 256, offset + 1)
        made.append(table[entries.to(device)].t())
    return made


def call(plan, qkv, bias, head_scale):
    return relative_bias_attention(
        qkv, cu_seqlens=plan.cu_seqlens, modality=plan.modality, code=plan.code, is_cls=plan.is_cls, bias=bias,
        code_offsets=plan.code_offsets if bias else (), head_scale=head_scale, max_length=plan.max_length,
    )  # fmt: skip


def inputs(length, dtype=torch.bfloat16, device="cuda"):
    torch.manual_seed(length)
    plan = plan_of(LENGTHS[length], device)
    qkv = (1.5 * torch.randn(plan.capacity, 3, HEADS, HEAD_DIM, device=device)).to(dtype)
    return plan, qkv, vectors_of(plan, LENGTHS[length], device), 1 + 0.5 * torch.randn(HEADS, device=device)


@pytest.fixture(autouse=True)
def no_slower_path():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_values_follow_the_specification(length, dtype):
    plan, qkv, bias, head_scale = inputs(length, dtype)
    actual = call(plan, qkv, bias, head_scale)
    with force_kernels(False):
        plain = call(plan, qkv, bias, head_scale)
        exact = call(plan, qkv.double(), [vector.double() for vector in bias], head_scale.double())
    bounds = plan.offsets.tolist()
    parts = [(slice(a, b), h) for a, b in pairwise(bounds) for h in range(HEADS)]
    assert_within_rule("out", actual, plain, exact, parts)


@pytest.mark.parametrize("length", LENGTHS)
def test_repeats_are_bitwise_equal(length):
    arguments = inputs(length)
    first = call(*arguments)
    assert all(torch.equal(call(*arguments), first) for _ in range(REPEATS - 1))


def test_a_captured_graph_follows_its_refilled_plan():
    def refill(text, image):
        lengths = {"text": text, "image": image}
        return plan_of(lengths, widths={"text": 40, "image": 17}, capacity=256)

    captured = refill([40, 3, 17], [17, 17, 17])
    qkv = torch.randn(256, 3, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    bias = vectors_of(captured, {"text": [40], "image": [17]})
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            call(captured, qkv, bias, None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(captured, qkv, bias, None)
    for text in ([1, 40, 2], [9, 9, 9]):
        other = refill(text, [17, 17, 17])
        captured.copy_(other)
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, call(other, qkv, bias, None))


def test_it_runs_on_the_stream_and_device_of_its_tensors():
    last = torch.cuda.device_count() - 1
    arguments = inputs(72, device=f"cuda:{last}")
    expected = call(*arguments)
    stream = torch.cuda.Stream(last)
    stream.wait_stream(torch.cuda.current_stream(last))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**7)
        on_stream = call(*arguments)
    stream.synchronize()
    assert torch.equal(on_stream, expected) and torch.cuda.current_device() == 0


def test_a_launch_that_cuda_refuses_raises_its_error_and_the_next_one_works():
    plan, qkv, bias, head_scale = inputs(72)
    expected = call(plan, qkv, bias, head_scale)
    with pytest.raises(RuntimeError, match="invalid"):
        cuda_extension.extension().relative_bias_attention_forward(
            device=10**6, samples=1, modalities=1, rows=1, heads=1, head_dim=32, max_length=1, scale=1.0,
            type="bfloat16", qkv=16, strides=(96, 32, 32), cu_seqlens=16, code=16, is_cls=16, bias=[], head_scale=0,
            head_scale_type="float32", out=16, log_sum_exp=16, stream=0,
        )  # fmt: skip
    assert torch.equal(call(plan, qkv, bias, head_scale), expected)
