"""Between the plan and the end of the backward pass nothing makes the host wait for the device.

Shown without a device, on fake tensors: see ``support.synchronization``. Under fake tensors an op runs its fake, so the
references, which are what runs on a device as long as no kernel does, are run by themselves as well.
"""

import dataclasses

import pytest
import torch
from support.every_op import attention_inputs, rowwise_inputs, run_both_passes
from support.plans import naive_layout, whole_rows
from support.synchronization import DEVICE, SYNCHRONIZED, no_synchronization
from torch._subclasses.fake_tensor import FakeTensor

from onepeace_fast import RoutePlan, kernels
from onepeace_fast.attention_structures import Segments
from onepeace_fast.config import TransformerConfig
from onepeace_fast.kernels.launch import recording
from onepeace_fast.layers import transformer
from onepeace_fast.ops.routed_ffn import ROUTED_FFN
from onepeace_fast.structures import DropPath, Routing

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


def step(model: transformer.Transformer, plan: RoutePlan) -> None:
    """Pack, a stack of two layers, unpack, a loss, and the gradients of everything."""
    interleaved = len(plan.padded_shapes) < len(plan.modalities)
    shapes = [(plan.padded_rows,)] if interleaved else plan.padded_shapes
    padded = [torch.randn(*shape, 8, device=DEVICE, requires_grad=True) for shape in shapes]
    bias = [torch.randn(2, 2 * offset + 4, device=DEVICE, requires_grad=True) for offset in plan.code_offsets]
    packed = plan.pack(padded[0] if interleaved else dict(zip(plan.modalities, padded, strict=True)))
    out = model(packed, plan, [bias])
    outputs = [plan.unpack_interleaved(out)] if interleaved else plan.unpack(out).values()
    sum(output.square().sum() for output in outputs).backward()
    for leaf in (*padded, *bias, *model.parameters()):
        assert leaf.grad is not None and leaf.grad.device == DEVICE and leaf.grad.shape == leaf.shape


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


def padded_masks() -> dict[str, torch.Tensor]:
    """A padded batch's, on the device."""
    shapes = {name: (len(lengths), max(lengths)) for name, lengths in LENGTHS.items()}
    return {name: torch.ones(shape, dtype=torch.bool, device=DEVICE) for name, shape in shapes.items()}


PLANS = {
    "lengths": lambda: RoutePlan.from_lengths(LENGTHS, samples=SAMPLES, device=DEVICE),
    "masks": lambda: RoutePlan.from_masks(padded_masks(), samples=SAMPLES, lengths=LENGTHS),
    "modality ids": plan_of_ids,
    "refilled": refilled_plan,
}
CASES = {f"{kind}, {branch}": (make, branch) for kind, make in PLANS.items() for branch in ("drop path", "every row")}
CASES["rows known"] = make_plan, ""
CASES["rows on the device"] = lambda: make_plan(on_host=False), ""


@pytest.mark.parametrize("dropout", (True, False))
@pytest.mark.parametrize("case", CASES)
def test_no_kind_of_plan_waits_from_packing_to_the_gradients(case, dropout):
    make, branch = CASES[case]
    with no_synchronization():
        plan = make()
        if branch == "drop path":
            plan = plan.with_drop_path(torch.empty(2, 2, plan.sample_count, device=DEVICE))
        step(make_model(dropout), plan)


@pytest.mark.skipif(kernels.unavailable_reason() is not None, reason="the launchers need Triton")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("where", ("all rows", "some rows"))
def test_the_launchers_read_no_tensor_on_the_host(where, dtype):
    """On plain tensors of the meta device, which refuse it; the host knows but the row counts of vendor products."""
    rows = 24

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=DEVICE)

    offsets, index = empty(4, dtype=torch.int32), empty(rows, dtype=torch.int32)
    with pytest.raises((RuntimeError, NotImplementedError)):
        offsets.tolist()
    stream = 32 if where == "some rows" else rows
    drop_path = DropPath(empty(4), empty(stream, dtype=torch.int32))
    with recording("sm_90", 132) as configurations:
        for strategy, counts in (("grouped", ()), ("hybrid", (9, 0, 15))):
            routing = Routing(offsets, counts, index if where == "some rows" else None)
            for operation, given in rowwise_inputs(empty, rows, stream, routing, drop_path, (strategy,)):
                run_both_passes(operation, given, "kernel")
    names = {configuration.kernel.__name__ for configuration in configurations}
    assert {
        "routed_ffn_hidden_kernel", "routed_ffn_output_kernel", "grouped_gradients_kernel",
        "routed_ffn_scale_gradient_kernel",
    } <= names  # fmt: skip
    assert len(configurations) > 25


def test_a_plan_from_masks_on_the_device_waits_exactly_once(monkeypatch):
    counts = [5, 7, 3, 4, 10, 6]
    reads = []
    monkeypatch.setattr(FakeTensor, "tolist", lambda self: reads.append(self.shape) or counts)
    with no_synchronization():
        plan = RoutePlan.from_masks(padded_masks(), samples=SAMPLES, first_is_cls=True)
    assert reads == [(6,)] and plan.row_counts == (15, 14, 6) and plan.max_length == 15


def run_references(plan: RoutePlan) -> None:
    """Both passes of all references, the FFN over kernels and attention on a GPU, on the plan, with every option."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE)

    rows, drop_path = plan.capacity, DropPath(random(plan.sample_count), plan.sample)
    index = torch.zeros(rows, dtype=torch.int32, device=DEVICE)
    for row_index in (None, index):
        routing = Routing(plan.offsets, plan.row_counts, row_index)
        given = rowwise_inputs(random, rows, rows, routing, drop_path, ("reference", "per_modality"))
        for operation, inputs in given:
            run_both_passes(operation, inputs, "kernel" if operation is ROUTED_FFN else "reference")
    segments = Segments(plan.cu_seqlens, plan.modality, plan.code, plan.is_cls, plan.max_length)
    for by in ("reference", "kernel"):
        attention, inputs = attention_inputs(random, rows, segments, plan.code_offsets)
        _, gradients = run_both_passes(attention, inputs, by)
        assert gradients.qkv.shape == inputs.qkv.shape and gradients.qkv.device == DEVICE


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
