"""Between the plan and the end of the backward pass nothing makes the host wait for the device.

Shown without a device, on fake tensors: see ``support.synchronization``. Under fake tensors an op runs its fake, so the
references, which are what runs on a device as long as no kernel does, are run by themselves as well.
"""

import dataclasses
import importlib

import pytest
import torch
from support.plans import naive_layout, whole_rows
from support.synchronization import DEVICE, SYNCHRONIZED, no_synchronization
from torch._subclasses.fake_tensor import FakeTensor

from onepeace_fast import RoutePlan, kernels
from onepeace_fast.config import TransformerConfig
from onepeace_fast.kernels.launch import recording
from onepeace_fast.layers import transformer
from onepeace_fast.ops import routed_ffn_per_modality as per_modality
from onepeace_fast.ops.relative_bias_attention import (
    relative_bias_attention_backward_on_gpu,
    relative_bias_attention_on_gpu,
)

LENGTHS = {"text": [5, 7, 3], "image": [4, 10], "audio": [6]}
SAMPLES = {"text": [0, 1, 2], "image": [2, 0], "audio": [1]}
CONFIG = TransformerConfig(
    embed_dim=8, ffn_embed_dim=12, layers=2, attention_heads=2, drop_path_rate=0.4, dropout=0.1, head_scale=True
)


# The host's own tensors must stay out of the fake mode, so what it counts is counted here.
KEEP = torch.tensor([[[1.0, 1, 1], [1, 1, 1]], [[0, 1.25, 1.25], [1.25, 0, 0]]])
KEPT = RoutePlan.from_lengths(LENGTHS, samples=SAMPLES, first_is_cls=True).with_drop_path(KEEP).branch_row_counts


def make_plan(on_host: bool = True) -> RoutePlan:
    """With DropPath's factors on the device, and what they keep known to the host or not."""
    plan = RoutePlan.from_lengths(LENGTHS, samples=SAMPLES, device=DEVICE, first_is_cls=True)
    plan = plan.with_drop_path(torch.empty(2, 2, plan.sample_count, device=DEVICE))
    return dataclasses.replace(plan, branch_row_counts=KEPT if on_host else ())


def make_model(dropout: bool = True) -> transformer.Transformer:
    """Two layers on the device, not initialised: drawing weights may wait."""
    config = CONFIG if dropout else dataclasses.replace(CONFIG, dropout=0.0)
    with pytest.MonkeyPatch.context() as patch, DEVICE:
        patch.setattr(transformer, "init_linear", lambda linear: linear)
        return transformer.Transformer(config)


def step(model: transformer.Transformer, plan: RoutePlan) -> list[torch.Tensor]:
    """Pack, a stack of two layers, unpack, a loss, and the gradients of everything."""
    padded = {
        name: torch.randn(*shape, 8, device=DEVICE, requires_grad=True)
        for name, shape in zip(plan.modalities, plan.padded_shapes, strict=True)
    }
    bias = [torch.randn(2, 2 * offset + 4, device=DEVICE, requires_grad=True) for offset in plan.code_offsets]
    out = plan.unpack(model(plan.pack(padded), plan, [bias]))
    sum(tensor.square().sum() for tensor in out.values()).backward()
    return [*padded.values(), *bias, *model.parameters()]


@pytest.mark.parametrize("on_host", (True, False), ids=("rows known", "rows on the device"))
@pytest.mark.parametrize("dropout", (True, False))
def test_a_stack_of_layers_from_host_lengths_never_waits(dropout, on_host):
    with no_synchronization():
        leaves = step(make_model(dropout), make_plan(on_host))
        assert sum(leaf.grad is not None for leaf in leaves) == len(leaves)
        assert all(leaf.grad.device == DEVICE and leaf.grad.shape == leaf.shape for leaf in leaves)


def refilled_plan() -> RoutePlan:
    """A plan with capacity that holds its second batch."""
    capacity = {"device": DEVICE, "samples": SAMPLES, "capacity": 64}
    widths = {name: max(lengths) for name, lengths in LENGTHS.items()}
    plan = RoutePlan.from_lengths(LENGTHS, widths=widths, **capacity)
    fewer = {name: [1] * len(lengths) for name, lengths in LENGTHS.items()}
    return plan.copy_(RoutePlan.from_lengths(fewer, widths=widths, **capacity))


def plan_of_ids() -> RoutePlan:
    """Interleaved tokens of two samples."""
    ids = torch.zeros(6, dtype=torch.int64, device=DEVICE)
    return RoutePlan.from_modality_ids(ids, ("text", "image", "audio"), sample_ids=ids, sample_count=2)


def plan_of_masks() -> RoutePlan:
    """A padded batch whose lengths the host knows."""
    masks = {
        name: torch.ones(len(lengths), max(lengths), dtype=torch.bool, device=DEVICE)
        for name, lengths in LENGTHS.items()
    }
    return RoutePlan.from_masks(masks, samples=SAMPLES, lengths=LENGTHS)


PLANS = {
    "lengths": lambda: RoutePlan.from_lengths(LENGTHS, samples=SAMPLES, device=DEVICE), "masks": plan_of_masks,
    "modality ids": plan_of_ids, "refilled": refilled_plan,
}  # fmt: skip


@pytest.mark.parametrize("drop_path", (True, False), ids=("drop path", "every row"))
@pytest.mark.parametrize("kind", PLANS)
def test_no_kind_of_plan_waits_from_packing_to_the_gradients(kind, drop_path):
    with no_synchronization():
        plan, model = PLANS[kind](), make_model()
        if drop_path:
            plan = plan.with_drop_path(torch.empty(2, 2, plan.sample_count, device=DEVICE))
        shapes = [(plan.padded_rows, 8)] if kind == "modality ids" else [(*shape, 8) for shape in plan.padded_shapes]
        padded = [torch.randn(*shape, device=DEVICE, requires_grad=True) for shape in shapes]
        interleaved = kind == "modality ids"
        packed = plan.pack(padded[0] if interleaved else dict(zip(plan.modalities, padded, strict=True)))
        bias = [torch.randn(2, 2 * offset + 4, device=DEVICE, requires_grad=True) for offset in plan.code_offsets]
        out = model(packed, plan, [bias])
        outputs = [plan.unpack_interleaved(out)] if interleaved else list(plan.unpack(out).values())
        sum(output.square().sum() for output in outputs).backward()
        leaves = [*padded, *bias, *model.parameters()]
        assert all(leaf.grad is not None and leaf.grad.device == DEVICE for leaf in leaves)


@pytest.mark.skipif(kernels.unavailable_reason() is not None, reason="the launchers need Triton")
@pytest.mark.parametrize("where", ("all rows", "some rows"))
def test_the_launchers_read_no_tensor_on_the_host(where):
    """On plain tensors of the meta device, which refuse it; nothing of a plan is known to the host."""
    rows, stream, width, hidden, groups = 24, 32, 16, 32, 3

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=DEVICE)

    offsets, index = empty(groups + 1, dtype=torch.int32), empty(rows, dtype=torch.int32)
    some = where == "some rows"
    place = index if some else None
    residual_rows = stream if some else rows
    gamma, keep, sample = empty(width), empty(4), empty(residual_rows, dtype=torch.int32)
    shapes = ((hidden, width), (hidden, width), (hidden,), (hidden,), (width, hidden), (width,))
    lists = [[empty(*shape) for _ in range(groups)] for shape in shapes]
    z, x, seed = empty(rows, width), empty(residual_rows, width), empty(dtype=torch.int64)
    vectors = [empty(width) for _ in range(groups)]

    def run(module: str, name: str, *arguments: object) -> tuple:
        return getattr(importlib.import_module(f"onepeace_fast.kernels.{module}"), name)(*arguments)

    with pytest.raises((RuntimeError, NotImplementedError)):
        offsets.tolist()
    with recording("sm_90", 132) as configurations:
        for fold in (True, False):
            out, u, v, y, mean, rstd = run(
                "routed_ffn", "routed_ffn", z, *lists, offsets, x, gamma, keep, sample, place, "gelu", 1e-5, fold,
                True, True, empty(2, groups, width, dtype=torch.float32),
            )  # fmt: skip
            run(
                "routed_ffn_backward", "routed_ffn_backward", out, z, *lists, offsets, gamma, keep, sample, place, u, v,
                y, mean, rstd, empty(2, groups, width, dtype=torch.float32), "gelu", [True] * (6 * groups + 1),
            )  # fmt: skip
        given = x if some else z
        normed, mean, rstd = run("layer_norm", "layer_norm", given, vectors, vectors, None, place, offsets, (), 1e-5)
        needs = [True] * groups
        run(
            "layer_norm", "layer_norm_backward", normed, given, mean, rstd, vectors, vectors, None, place, offsets, (),
            needs, needs, False,
        )  # fmt: skip
        branch_offsets = offsets if some else None
        scaling = (gamma, keep, sample, 0.1, seed, place, branch_offsets)
        out, normed, mean, rstd = run("residual", "residual", x, z, *scaling, gamma, gamma, 1e-5)
        run(
            "residual", "residual_backward", out, normed, z, *scaling, out, gamma, gamma, mean, rstd, z.dtype,
            [True] * 3,
        )  # fmt: skip
    names = {configuration.kernel.__name__ for configuration in configurations}
    needed = ("routed_ffn_hidden", "routed_ffn_output", "routed_ffn_scale_gradient", "grouped_gemm_input_gradient",
              "grouped_gemm_weight_gradient")  # fmt: skip
    assert {f"{name}_kernel" for name in needed} <= names
    assert len(configurations) > 25


def test_a_plan_from_modality_ids_never_waits():
    with no_synchronization():
        ids = torch.zeros(6, dtype=torch.int64, device=DEVICE)
        plan = RoutePlan.from_modality_ids(ids, ("text", "image"), sample_ids=ids, sample_count=2)
        assert plan.unpack_interleaved(plan.pack(torch.zeros(6, 4, device=DEVICE))).shape == (6, 4)


def test_a_plan_from_masks_on_the_device_waits_exactly_once(monkeypatch):
    counts = [5, 7, 3, 4, 10, 6]
    widths = {name: max(lengths) for name, lengths in LENGTHS.items()}
    reads = []
    monkeypatch.setattr(FakeTensor, "tolist", lambda self: reads.append(self.shape) or counts)
    with no_synchronization():
        masks = {
            name: torch.ones(len(lengths), widths[name], dtype=torch.bool, device=DEVICE)
            for name, lengths in LENGTHS.items()
        }
        plan = RoutePlan.from_masks(masks, samples=SAMPLES, first_is_cls=True)
    assert reads == [(6,)] and plan.row_counts == (15, 14, 6) and plan.max_length == 15


def reference(name: str):
    module = importlib.import_module(f"onepeace_fast.ops.{name}")
    return getattr(module, f"{name}_reference"), getattr(module, f"{name}_backward_reference")


def run_references(plan: RoutePlan) -> None:
    """All references and their backward ones, and the FFN over kernels, on the plan, with every option."""
    rows, groups, width, heads = plan.capacity, len(plan.modalities), 8, 2

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE)

    x, y, gamma = random(rows, width), random(rows, width), random(width)
    seed = torch.zeros((), dtype=torch.int64, device=DEVICE)
    weights, keep = [random(width) for _ in range(groups)], random(plan.sample_count)
    forward, backward = reference("layer_norm")
    scale, index = random(heads), torch.zeros(rows, dtype=torch.int32, device=DEVICE)
    _, mean, rstd = forward(x, weights, weights, scale, index, plan.offsets, plan.row_counts, 1e-5)
    needs = [True] * groups
    backward(x, x, mean, rstd, weights, weights, scale, index, plan.offsets, plan.row_counts, needs, needs, True)

    forward, backward = reference("residual")
    scaling = (gamma, keep, plan.sample, 0.1, seed)
    for places in ((None, None), (index, plan.offsets)):
        out, normed, mean, rstd = forward(x, y, *scaling, *places, gamma, gamma, 1e-5)
        saved = (out, gamma, gamma, mean, rstd)
        backward(out, normed, y, *scaling, *places, *saved, y.dtype, [True] * 3)

    forward, backward = reference("gated_sub_ln")
    _, mean, rstd = forward(x, y, weights, weights, plan.offsets, plan.row_counts, "gelu", 1e-5)
    backward(x, x, y, mean, rstd, weights, weights, plan.offsets, plan.row_counts, "gelu", needs, needs, True)

    forward, backward = reference("routed_ffn")
    shapes = ((12, width), (12, width), (12,), (12,), (width, 12), (width,))
    lists = [[random(*shape) for _ in range(groups)] for shape in shapes]
    extents = (plan.offsets, plan.row_counts)
    scaling = (gamma, keep, plan.sample)
    needed = [True] * (6 * groups + 1)
    for places in (None, index):
        out, *saved = forward(x, *lists, *extents, y, *scaling, places, "gelu", 1e-5)
        backward(out, x, *lists, *extents, *scaling, places, *saved, "gelu", 1e-5, needed)
        out, *saved = per_modality.routed_ffn(x, *lists, *extents, y, *scaling, places, "gelu", 1e-5)
        per_modality.routed_ffn_backward(out, x, *lists, *extents, *scaling, places, *saved, "gelu", needed)

    forward, backward = reference("relative_bias_attention")
    qkv, head_scale = random(rows, 3, heads, 4), random(heads)
    bias = [random(heads, 2 * offset + 4) for offset in plan.code_offsets]
    places = (plan.cu_seqlens, plan.modality, plan.code, plan.is_cls, bias, plan.code_offsets, head_scale)
    out, total = forward(qkv, *places, 0.5, plan.max_length)
    backward(out, qkv, *places, total, 0.5, plan.max_length, needs, True)
    out, total = relative_bias_attention_on_gpu(qkv, *places, 0.5, plan.max_length)
    rest = (total, 0.5, plan.max_length, needs, True)
    dqkv, *_ = relative_bias_attention_backward_on_gpu(out, qkv, *places, *rest)
    assert dqkv.shape == qkv.shape and dqkv.device == DEVICE


def test_the_references_never_wait():
    with no_synchronization():
        run_references(make_plan())


@pytest.mark.parametrize("missing", ({"row_counts": ()}, {"max_length": 0}), ids=str)
def test_without_the_host_s_numbers_the_references_do_wait(missing):
    with no_synchronization():
        plan = dataclasses.replace(make_plan(), **missing)
        with pytest.raises(SYNCHRONIZED):
            run_references(plan)


WAITS = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.flatten().tolist(),
    "bool": lambda x: bool((x > 0).any()),
    "int": lambda x: int(x.sum()),
    "boolean mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "cpu": lambda x: x.cpu(),
    "copy_": lambda x: torch.empty(x.shape).copy_(x),
}


@pytest.mark.parametrize("wait", WAITS)
@pytest.mark.parametrize("where", ("forward", "backward"))
def test_a_wait_that_is_put_into_a_layer_is_noticed(monkeypatch, where, wait):
    original = transformer.residual_layer_norm

    def waiting(x, *args, **kwargs):
        if where == "forward":
            WAITS[wait](x.detach())
        else:
            x.register_hook(lambda gradient: WAITS[wait](gradient) and None)
        return original(x, *args, **kwargs)

    monkeypatch.setattr(transformer, "residual_layer_norm", waiting)
    with no_synchronization():
        model, plan = make_model(), make_plan()
        with pytest.raises(SYNCHRONIZED):
            step(model, plan)


def test_device_plans_have_the_shapes_and_dtypes_of_host_plans():
    host = RoutePlan.from_lengths(LENGTHS, samples=SAMPLES, first_is_cls=True)
    assert host.max_length == naive_layout(whole_rows(LENGTHS), SAMPLES).max_length
    with no_synchronization():
        plan = RoutePlan.from_lengths(LENGTHS, samples=SAMPLES, device=DEVICE, first_is_cls=True)
    for item in dataclasses.fields(RoutePlan):
        mine, theirs = getattr(plan, item.name), getattr(host, item.name)
        if isinstance(mine, torch.Tensor):
            assert (mine.shape, mine.dtype, mine.device) == (theirs.shape, theirs.dtype, DEVICE), item.name
        else:
            assert mine == theirs, item.name
