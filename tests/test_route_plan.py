"""``RoutePlan`` from masks, lengths and modality ids, against the same layout built token by token."""

import dataclasses
from functools import partial
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.contract import message_of, refused
from support.plans import kept_positions, naive_layout, whole_rows

from onepeace_fast import RoutePlan
from onepeace_fast.routing import check_samples

NAMES = ("text", "image", "audio", "video")
FEW = settings(max_examples=60, deadline=None)
from_masks = partial(RoutePlan.from_masks, first_is_cls=True)
from_lengths = partial(RoutePlan.from_lengths, first_is_cls=True)


@st.composite
def ragged_batches(draw) -> dict[str, Any]:
    """Masks of one to four modalities that lack samples, in any order, and position ids and codes for some."""
    samples = draw(st.integers(1, 4))
    names = draw(st.permutations(NAMES))[: draw(st.integers(1, 4))]
    present = {name: [s for s in range(samples) if draw(st.booleans())] for name in names}
    missing = set(range(samples)) - set().union(*map(set, present.values()))
    present[names[-1]] += sorted(missing)
    rows = {name: draw(st.permutations(values)) for name, values in present.items()}
    masks, positions, codes = {}, {}, {}
    for name in names:
        width = draw(st.integers(1, 6))
        masks[name] = [[draw(st.booleans()) for _ in range(width)] for _ in rows[name]]
        if draw(st.booleans()):
            seeds = st.integers(0, 2**16)
            positions[name] = [kept_positions([width], 3 * width, draw(seeds))[0] for _ in rows[name]]
        if draw(st.booleans()):
            codes[name] = draw(st.permutations(range(3 * width + 1)))
        masks[name] = torch.tensor(masks[name], dtype=torch.bool).view(len(rows[name]), width)
    return {"masks": masks, "samples": rows, "positions": positions, "codes": codes, "extra": draw(st.integers(0, 3))}


def capacity_of(batch: dict[str, Any]) -> int | None:
    """Rows for a plan that may be refilled; None for one of this batch alone."""
    rows = sum(int(mask.sum()) for mask in batch["masks"].values())
    return rows + batch["extra"] if batch["extra"] else None


def build(batch: dict[str, Any], **changes: Any) -> RoutePlan:
    arguments = {
        "samples": batch["samples"],
        "positions": {
            name: torch.tensor(value, dtype=torch.int64).view(-1, batch["masks"][name].shape[1])
            for name, value in batch["positions"].items()
        },
        "codes": {name: torch.tensor(value) for name, value in batch["codes"].items()},
        "capacity": capacity_of(batch),
    }
    return from_masks(batch["masks"], **arguments | changes)


def naive_of(batch: dict[str, Any]):
    real = {name: [row.nonzero().flatten().tolist() for row in mask] for name, mask in batch["masks"].items()}
    count = sum(map(len, (row for rows in real.values() for row in rows)))
    return naive_layout(real, batch["samples"], batch["positions"], batch["codes"], count + batch["extra"])


def same_tensors(a: RoutePlan, b: RoutePlan) -> bool:
    pairs = [(getattr(a, item.name), getattr(b, item.name)) for item in dataclasses.fields(RoutePlan)]
    return all(torch.equal(x, y) and x.dtype == y.dtype if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


@FEW
@given(ragged_batches())
def test_every_tensor_is_that_of_the_naive_layout(batch):
    plan, naive = build(batch), naive_of(batch)
    assert plan.modalities == tuple(batch["masks"]) and plan.sample_count == naive.samples
    assert plan.capacity == naive.capacity
    assert torch.equal(plan.offsets, naive.offsets) and plan.offsets.dtype == torch.int32
    assert torch.equal(plan.cu_seqlens, naive.cu_seqlens) and plan.cu_seqlens.dtype == torch.int32
    assert torch.equal(plan.modality, naive.column("modality", naive.modalities))
    for name in ("sample", "position", "code", "order"):
        assert torch.equal(getattr(plan, name), naive.column(name)), name
        assert getattr(plan, name).dtype == torch.int32
    assert torch.equal(plan.is_cls, naive.column("is_cls").bool()) and plan.is_cls.dtype == torch.bool
    shapes = [tuple(mask.shape) for mask in batch["masks"].values()]
    if batch["extra"]:
        assert plan.row_counts == () and plan.max_length == sum(width for _, width in shapes) >= naive.max_length
    else:
        assert plan.row_counts == tuple(naive.row_counts) and plan.max_length == naive.max_length
    assert plan.padded_shapes == tuple(shapes) and plan.code_offsets == tuple(width - 1 for _, width in shapes)
    starts = [sum(rows * width for rows, width in shapes[:m]) for m in range(len(shapes) + 1)]
    expected = [starts[t.modality] + t.row * shapes[t.modality][1] + t.column for t in naive.tokens]
    assert plan.source[: len(expected)].tolist() == expected
    assert (plan.source[len(expected) :] >= starts[-1]).all()


@FEW
@given(ragged_batches())
def test_pack_and_unpack_are_inverse(batch):
    plan, naive = build(batch), naive_of(batch)
    padded = {name: torch.randn(*mask.shape, 3) for name, mask in batch["masks"].items()}
    packed = plan.pack(padded)
    assert packed.shape == (plan.capacity, 3)
    names = plan.modalities
    for row, token in enumerate(naive.tokens):
        assert torch.equal(packed[row], padded[names[token.modality]][token.row, token.column])
    packed[len(naive.tokens) :] = torch.nan
    for name, tensor in plan.unpack(packed).items():
        assert torch.equal(tensor, torch.where(batch["masks"][name][..., None], padded[name], 0.0))


@FEW
@given(ragged_batches())
def test_the_gradient_of_pack_and_unpack_is_zero_at_padding(batch):
    plan = build(batch)
    padded = {name: torch.randn(*mask.shape, 2, requires_grad=True) for name, mask in batch["masks"].items()}
    weights = {name: torch.randn_like(tensor) for name, tensor in padded.items()}
    unpacked = plan.unpack(plan.pack(padded))
    sum((unpacked[name] * weights[name]).sum() for name in padded).backward()
    for name, mask in batch["masks"].items():
        expected = torch.where(mask[..., None], weights[name], 0.0)
        assert torch.equal(padded[name].grad, expected)


@FEW
@given(ragged_batches(), st.data())
def test_host_lengths_give_the_plan_of_masks(batch, data):
    real = {name: mask.sum(1).tolist() for name, mask in batch["masks"].items()}
    assert same_tensors(build(batch, lengths=real), build(batch))
    widths = {name: mask.shape[1] for name, mask in batch["masks"].items()}
    lengths = {name: [data.draw(st.integers(0, widths[name])) for _ in rows] for name, rows in real.items()}
    masks = {
        name: torch.arange(widths[name]) < torch.tensor(values, dtype=torch.int64)[:, None]
        for name, values in lengths.items()
    }
    plan = from_lengths(lengths, widths=widths, samples=batch["samples"])
    assert same_tensors(plan, from_masks(masks, samples=batch["samples"]))


def test_widths_are_the_longest_rows_by_default():
    plan = from_lengths({"text": [2, 5], "audio": [1, 3]})
    assert plan.padded_shapes == ((2, 5), (2, 3)) and plan.code_offsets == (4, 2)


def test_cls_is_the_last_row_of_its_segment_and_comes_first_in_public():
    plan = from_lengths({"text": [3, 1], "image": [2, 4]})
    assert plan.cu_seqlens.tolist() == [[0, 3, 4], [4, 6, 10]]
    assert plan.is_cls.nonzero().flatten().tolist() == [2, 3, 5, 9]
    assert plan.position.tolist() == [1, 2, 0, 0, 1, 0, 1, 2, 3, 0]
    assert plan.order.tolist() == [0, 1, 2, 0, 3, 4, 1, 2, 3, 4]


def test_grid_codes_and_code_offsets_are_taken():
    codes = torch.tensor([0, 0, 1, 3, 4], dtype=torch.int32)
    plan = from_lengths({"image": [5, 5]}, codes={"image": codes}, code_offsets={"image": 4})
    assert plan.code.tolist() == [0, 1, 3, 4, 0] * 2 and plan.code_offsets == (4,)


@pytest.mark.parametrize(
    "lengths, samples",
    [
        ({"text": []}, None),
        ({"text": [], "image": []}, None),
        ({"text": [2, 3], "audio": []}, {"text": [1, 0], "audio": []}),
        ({"text": [0, 3]}, None),
        ({"text": [0, 0]}, None),
    ],
)
def test_empty_batches_modalities_and_rows(lengths, samples):
    plan = from_lengths(lengths, samples=samples, capacity=7)
    naive = naive_layout(whole_rows(lengths), samples, capacity=7)
    assert torch.equal(plan.offsets, naive.offsets) and torch.equal(plan.cu_seqlens, naive.cu_seqlens)
    padded = {name: torch.randn(*shape, 2) for name, shape in zip(lengths, plan.padded_shapes, strict=True)}
    packed = plan.pack(padded)
    assert packed.shape == (7, 2)
    for name, tensor in plan.unpack(packed).items():
        for row, length in enumerate(lengths[name]):
            assert torch.equal(tensor[row, :length], padded[name][row, :length]) and not tensor[row, length:].any()


def test_a_capacity_that_is_too_small_is_refused():
    lengths = {"text": [2, 3]}
    assert from_lengths(lengths, capacity=5).capacity == 5
    refused("capacity", from_lengths, lengths, capacity=4)
    refused("capacity", from_masks, {"text": torch.ones(2, 3, dtype=torch.bool)}, capacity=5)


@pytest.mark.parametrize(
    "samples",
    [{"text": [0, 0], "image": [1]}, {"text": [0, 2], "image": [0]}, {"text": [1, 2], "image": [2]},
     {"text": [0, -1], "image": [0]}, {"text": [0, 1]}, {"text": [0, 1], "image": [0], "audio": []},
     {"text": [0], "image": [0]}, {"text": [0, 1, 2], "image": [0]}, None],
    ids=str,
)  # fmt: skip
def test_samples_that_repeat_leave_gaps_or_disagree_are_refused(samples):
    refused("samples", from_lengths, {"text": [2, 3], "image": [4]}, samples=samples)
    refused("samples", check_samples, {"text": 2, "image": 1}, samples)


def test_bad_masks_widths_and_lengths_are_refused():
    mask = torch.ones(2, 3, dtype=torch.bool)
    refused("masks", from_masks, {})
    refused("masks['text']", from_masks, {"text": mask.int()})
    refused("masks['text']", from_masks, {"text": mask[0]})
    refused("masks['image']", from_masks, {"text": mask, "image": mask.to("meta")})
    refused("widths['text']", from_lengths, {"text": [2, 3]}, widths={"text": 2})
    for lengths in ({"text": [3]}, {"text": [3, 3, 3]}, {"image": [3, 3]}, {"text": [4, 3]}, {"text": [-1, 3]}):
        refused("lengths", from_masks, {"text": mask}, lengths=lengths)


def test_bad_positions_are_refused():
    mask = torch.ones(2, 3, dtype=torch.bool)
    for bad in (torch.zeros(2, 4).int(), torch.zeros(2, 3)):
        refused("positions['text']", from_masks, {"text": mask}, positions={"text": bad})


def test_a_position_0_that_is_not_the_first_column_s_is_refused_where_that_is_cls():
    mask = torch.tensor([[True, True, True], [True, True, False]])
    for bad in ([[0, 1, 2], [1, 0, 2]], [[0, 1, 0], [0, 1, 2]]):
        positions = {"text": torch.tensor(bad)}
        refused("positions['text']", from_masks, {"text": mask}, positions=positions)
        RoutePlan.from_masks({"text": mask}, positions=positions)
    from_masks({"text": mask}, positions={"text": torch.tensor([[0, 1, 2], [0, 3, 0]])})


def test_lengths_that_the_masks_do_not_count_are_refused():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    for lengths in ([2, 2], [3, 1], [1, 2], [2, 0]):
        refused("lengths['text']", from_masks, {"text": mask}, lengths={"text": lengths})
    assert from_masks({"text": mask}, lengths={"text": [2, 1]}).row_counts == (3,)


def test_positions_without_a_code_are_refused():
    mask, codes = torch.ones(1, 2, dtype=torch.bool), {"image": torch.arange(5)}
    for bad in ([[0, 5]], [[-1, 0]]):
        positions = {"image": torch.tensor(bad)}
        refused("positions['image']", from_masks, {"image": mask}, positions=positions, codes=codes)
    refused("positions['text']", from_masks, {"text": mask}, positions={"text": torch.tensor([[0, 1024]])})


def test_refilling_keeps_the_storage():
    masks = torch.ones(2, 4, dtype=torch.bool)
    first = from_masks({"text": masks}, capacity=9).with_drop_path(torch.ones(1, 2, 2))
    masks = torch.tensor([[True, False, True, True], [True, True, False, False]])
    second = from_masks({"text": masks}, capacity=9).with_drop_path(torch.zeros(1, 2, 2))
    tensors = {i.name: getattr(first, i.name) for i in dataclasses.fields(first)}
    tensors = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    assert len(tensors) == 10
    pointers = {name: value.data_ptr() for name, value in tensors.items()}
    assert first.copy_(second) is first
    for name, pointer in pointers.items():
        assert getattr(first, name).data_ptr() == pointer and torch.equal(getattr(first, name), getattr(second, name))
        assert getattr(second, name).data_ptr() != pointer


def test_refilling_from_another_kind_of_plan_is_refused():
    lengths, drop_path = {"text": [2, 3]}, torch.ones(1, 2, 2)
    plan = from_lengths(lengths, capacity=8)
    before = dataclasses.replace(plan, sample=plan.sample.clone())
    others = {
        "modalities": from_lengths({"image": [2, 3]}, capacity=8),
        "cu_seqlens": from_lengths({"text": [2, 2, 1]}, capacity=8),
        "capacity": from_lengths(lengths, capacity=7),
        "padded_shapes": from_lengths(lengths, widths={"text": 4}, capacity=8),
        "code_offsets": from_lengths(lengths, code_offsets={"text": 9}, capacity=8),
        "drop_path": plan.with_drop_path(drop_path),
        "has_cls": from_lengths(lengths, first_is_cls=False, capacity=8),
    }
    for other in others.values():
        refused("other", plan.copy_, other)
    refused("other", plan.with_drop_path(drop_path).copy_, plan)
    refused("other", plan.with_drop_path(drop_path).copy_, plan.with_drop_path(torch.ones(2, 2, 2)))
    assert same_tensors(plan, before)


def test_tensors_of_other_rows_or_lengths_are_refused_and_not_packed():
    plan = RoutePlan.from_lengths({"a": [2, 3], "b": [4, 1]})
    tensors = {"a": torch.randn(2, 3, 8), "b": torch.randn(2, 4, 8)}
    assert plan.pack(tensors).shape == (10, 8)
    swapped = {"a": tensors["b"], "b": tensors["a"]}
    length_first = {name: tensor.transpose(0, 1) for name, tensor in tensors.items()}
    longer = tensors | {"b": torch.zeros(2, 5, 8)}
    for bad in (swapped, length_first, longer, {"a": tensors["a"]}):
        refused("padded: expected tensors of the plan's rows and lengths, ", plan.pack, bad)


OTHERS = {
    "width": torch.zeros(2, 4, 9), "wider dtype": torch.zeros(2, 4, 8).double(),
    "half precision": torch.zeros(2, 4, 8).half(), "device": torch.zeros(2, 4, 8, device="meta"),
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_tensors_of_other_widths_or_dtypes_are_refused_by_pack(other):
    plan, a = RoutePlan.from_lengths({"a": [2, 3], "b": [4, 1]}), torch.zeros(2, 3, 8)
    kind, (*_, width) = str(other.dtype).removeprefix("torch."), other.shape
    assert message_of(plan.pack, {"b": other, "a": a}) == (
        "padded: expected tensors of one width, dtype and device, got float32 [2, 3, 8] on cpu of 'a' and "
        f"{kind} [2, 4, {width}] on {other.device} of 'b'"
    )


def test_autocast_joins_half_precision_and_float32():
    plan = RoutePlan.from_lengths({"a": [2, 3], "b": [4, 1]})
    tensors = {"a": torch.randn(2, 3, 8).bfloat16(), "b": torch.randn(2, 4, 8)}
    with torch.autocast("cpu", torch.bfloat16):
        packed = plan.pack(tensors)
    assert torch.equal(packed, plan.pack({name: x.float() for name, x in tensors.items()}))


def test_a_list_in_the_place_of_a_dictionary_is_refused():
    plan = RoutePlan.from_lengths({"a": [2]})
    said = "{}: expected a dictionary by modality's name, got list [1]"
    calls = {
        "lengths": RoutePlan.from_lengths, "masks": RoutePlan.from_masks, "padded": plan.pack,
        "indices": lambda given: RoutePlan.from_indices(given, 1),
        "widths": lambda given: RoutePlan.from_lengths({"a": [2]}, widths=given),
    }  # fmt: skip
    for name, call in calls.items():
        assert message_of(call, [1]) == said.format(name)
    assert message_of(RoutePlan.from_token_masks, [1]) == said.format("masks")


def test_a_length_below_zero_is_refused_in_one_line():
    refused("lengths['a']: expected none below 0, got [2, -1]", RoutePlan.from_lengths, {"a": [2, -1]})


@pytest.mark.parametrize("lengths", ([3.0, 2.0], [3, 2.5], torch.tensor([3.0, 2.0])), ids=str)
def test_lengths_are_integers(lengths):
    said = message_of(RoutePlan.from_lengths, {"text": lengths})
    assert said.startswith("lengths['text']: expected integers, got list [")
    mask = torch.arange(3) < torch.tensor([[3], [2]])
    assert message_of(RoutePlan.from_masks, {"text": mask}, lengths={"text": lengths}) == said
    for integers in ([3, 2], torch.tensor([3, 2]), numpy.array([3, 2])):
        assert RoutePlan.from_lengths({"text": integers}).row_counts == (5,)


def test_a_prefix_is_a_sequence_of_the_plan_s_modalities():
    plan = RoutePlan.from_lengths({"text": [3], "image": [2]})
    said = "prefix: expected some of ['text', 'image'], got ['sound', 'img']"
    assert message_of(plan.prefix_order, ["image", "sound", "img"]) == said
    said = "prefix: expected a list of names, got 'image'; give ['image']"
    assert message_of(plan.prefix_order, "image") == said
