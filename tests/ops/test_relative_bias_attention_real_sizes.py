"""``relative_bias_attention`` by the CUDA kernels at the model's sizes; all of it needs a GPU."""

import warnings
from itertools import pairwise

import pytest
import torch
from support import contract
from support.dense_attention import dense_attention
from support.graphs import captured

from onepeace_fast import RoutePlan, cuda_extension, relative_bias_attention
from onepeace_fast.relative_position import (
    CLS_ENTRIES,
    grid_code_offset,
    grid_codes,
    grid_table_rows,
    series_index,
    series_vector_index,
)
from onepeace_fast.tolerance import HALF

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(cuda_extension.extension() is None, reason="the CUDA extension is not built"),
]
HEADS, HEAD_DIM, REPEATS = 4, 64, 50
DTYPES_OF_GRADIENTS = [(dtype, dtype) for dtype in HALF] + [(torch.bfloat16, torch.float32)]  # the last: autocast
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
    return RoutePlan.from_lengths(
        lengths, device=device, codes=codes, code_offsets=offsets, **keywords, first_is_cls=True
    )


def kept_plan(share, device="cuda"):
    """A plan of three texts and of this share of the patches of three images."""
    mask = torch.zeros(3, 257, dtype=torch.bool)
    mask[:, 0] = True
    for row in mask:
        row[1 + torch.randperm(256)[: round(256 * share)]] = True
    lengths = {"text": [72, 9, 33], "image": mask.sum(1).tolist()}
    text = torch.arange(72) < torch.tensor(lengths["text"])[:, None]
    return RoutePlan.from_masks(
        {"text": text.to(device), "image": mask.to(device)}, lengths=lengths,
        codes={"image": grid_codes(16, 16).to(device)}, code_offsets={"image": grid_code_offset(16)}, first_is_cls=True,
    )  # fmt: skip


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


def call(plan, qkv, bias, head_scale, attend=relative_bias_attention):
    return attend(
        qkv, cu_seqlens=plan.cu_seqlens, modality=plan.modality, code=plan.code, is_cls=plan.is_cls, bias=bias,
        code_offsets=plan.code_offsets if bias else (), head_scale=head_scale, max_length=plan.max_length,
    )  # fmt: skip


def inputs(length, dtype=torch.bfloat16, device="cuda"):
    torch.manual_seed(length)
    plan = plan_of(LENGTHS[length], device)
    qkv = (1.5 * torch.randn(plan.capacity, 3, HEADS, HEAD_DIM, device=device)).to(dtype)
    return plan, qkv, vectors_of(plan, LENGTHS[length], device), 1 + 0.5 * torch.randn(HEADS, device=device)


def gradient_of(qkv):
    """A gradient of the result."""
    generator = torch.Generator(qkv.device).manual_seed(1)
    return torch.randn(qkv[:, 0].shape, device=qkv.device, generator=generator).to(qkv.dtype)


def differentiate(plan, qkv, bias, head_scale, grad):
    """The result, and the gradients of qkv, the vectors and the head scale."""
    leaves = [tensor.detach().requires_grad_() for tensor in (qkv, *bias, head_scale)]
    out = call(plan, leaves[0], leaves[1:-1], leaves[-1])
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def check(plan, qkv, bias, head_scale):
    """Results and gradients by both kernels, in every modality and head, the vectors' entries of CLS apart."""
    names = [f"bias of {name}" for name in plan.modalities]
    leaves = {"qkv": qkv, **dict(zip(names, bias, strict=True)), "head_scale": head_scale}
    parts, heads = [slice(a, b) for a, b in pairwise(plan.offsets.tolist())], range(HEADS)
    entries = [(head, part) for head in heads for part in (slice(None, -CLS_ENTRIES), slice(-CLS_ENTRIES, None))]
    slices = {"out0": [(part, head) for part in parts for head in heads], **dict.fromkeys(names, entries)}
    slices["qkv"] = [(part, which, head) for part in parts for which in range(3) for head in heads]

    def by(attend):
        return lambda qkv, head_scale, **bias: call(plan, qkv, [*bias.values()], head_scale, attend)

    before, dtypes = cuda_extension.launched(), {name: leaf.dtype for name, leaf in leaves.items()}
    contract.check_against_naive(by(relative_bias_attention), by(dense_attention), leaves, dtypes, slices)
    assert cuda_extension.launched() - before == 2


@pytest.fixture(autouse=True)
def no_slower_path():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


@pytest.mark.parametrize("dtype, of_parameters", DTYPES_OF_GRADIENTS, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_values_and_gradients_follow_the_dense_bias(length, dtype, of_parameters):
    plan, qkv, bias, head_scale = inputs(length, dtype)
    check(plan, qkv, [vector.to(of_parameters) for vector in bias], head_scale.to(of_parameters))


@pytest.mark.parametrize("dtype, of_parameters", DTYPES_OF_GRADIENTS, ids=str)
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 1.0])
def test_values_and_gradients_of_kept_patches_follow_the_dense_bias(share, dtype, of_parameters):
    _, _, bias, head_scale = inputs(329)
    plan = kept_plan(share)
    qkv = (1.5 * torch.randn(plan.capacity, 3, HEADS, HEAD_DIM, device="cuda")).to(dtype)
    check(plan, qkv, [vector.to(of_parameters) for vector in bias], head_scale.to(of_parameters))


@pytest.mark.parametrize("length", LENGTHS)
def test_repeats_are_bitwise_equal(length):
    arguments = inputs(length)
    grad = gradient_of(arguments[1])
    first = differentiate(*arguments, grad)
    for _ in range(REPEATS - 1):
        assert all(map(torch.equal, differentiate(*arguments, grad), first))


def test_a_captured_graph_follows_its_refilled_plan():
    def refill(text, image):
        lengths = {"text": text, "image": image}
        return plan_of(lengths, widths={"text": 40, "image": 17}, capacity=256)

    plan = refill([40, 3, 17], [17, 17, 17])
    qkv = torch.randn(256, 3, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    bias, head_scale = vectors_of(plan, {"text": [40], "image": [17]}), torch.rand(HEADS, device="cuda")
    tensors = (qkv, bias, head_scale, gradient_of(qkv))
    replay, results = captured(lambda: differentiate(plan, *tensors))
    for text in ([1, 40, 2], [9, 9, 9]):
        other = refill(text, [17, 17, 17])
        plan.copy_(other)
        for result in results:
            result.fill_(torch.nan)
        replay()
        assert all(map(torch.equal, results, differentiate(other, *tensors)))


def test_it_runs_on_the_stream_and_device_of_its_tensors():
    last = torch.cuda.device_count() - 1
    arguments = inputs(72, device=f"cuda:{last}")
    arguments = (*arguments, gradient_of(arguments[1]))
    expected = differentiate(*arguments)
    stream = torch.cuda.Stream(last)
    stream.wait_stream(torch.cuda.current_stream(last))
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**7)
        on_stream = differentiate(*arguments)
    stream.synchronize()
    assert all(map(torch.equal, on_stream, expected)) and torch.cuda.current_device() == 0


def test_a_launch_that_cuda_refuses_raises_its_error_and_the_next_one_works():
    arguments = inputs(72)
    arguments = (*arguments, gradient_of(arguments[1]))
    expected = differentiate(*arguments)
    rows, matrix = (1, 1, 1, 16, 16, 16, 0), (16, 96, 32)
    nowhere = cuda_extension.extension().RelativeBiasAttention(
        device=10**6, samples=1, heads=1, head_dim=32, value_dim=32, scale=1.0, type="bfloat16", q=matrix, k=matrix,
        v=matrix, queries=rows, keys=rows, bias=[], head_scale=0, head_scale_type="float32",
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="invalid"):
        nowhere.forward(out=16, log_sum_exp=16, stream=0)
    with pytest.raises(RuntimeError, match="invalid"):
        nowhere.backward(
            multiprocessors=1, bias=[], head_scale=0, grad=16, grad_strides=(32, 32), log_sum_exp=16, q=(16, 96),
            k=(16, 96), v=(16, 96), workspace=16, stream=0,
        )  # fmt: skip
    assert all(map(torch.equal, differentiate(*arguments), expected))
