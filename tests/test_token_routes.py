"""Plans of tokens in any order from boolean masks and from lists of indices, against plans from modality ids."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.contract import message_of, refused
from support.synchronization import DEVICE, no_synchronization
from torch import Tensor

from onepeace_fast import RelativeBiasAttention, RoutePlan, token_routes

NAMES = ("text", "image", "audio")
FEW = settings(max_examples=40, deadline=None)
IDS = torch.tensor([0, 2, 0, 1, 2, 2])


def masks_of(ids: Tensor) -> dict[str, Tensor]:
    return {name: ids == m for m, name in enumerate(NAMES)}


def indices_of(ids: Tensor) -> dict[str, list[int]]:
    return {name: (ids == m).nonzero().flatten().tolist() for m, name in enumerate(NAMES)}


def assert_same_plan(actual: RoutePlan, expected: RoutePlan) -> None:
    for item in dataclasses.fields(RoutePlan):
        mine, theirs = getattr(actual, item.name), getattr(expected, item.name)
        same = torch.equal(mine, theirs) and mine.dtype == theirs.dtype if isinstance(mine, Tensor) else mine == theirs
        assert same, item.name


@FEW
@given(st.lists(st.integers(0, 2), max_size=20))
def test_masks_and_indices_route_as_ids_do(numbers):
    ids = torch.tensor(numbers, dtype=torch.int64)
    expected = RoutePlan.from_modality_ids(ids, NAMES)
    assert_same_plan(RoutePlan.from_token_masks(masks_of(ids)), expected)
    assert_same_plan(RoutePlan.from_token_masks(masks_of(ids), inert=True, last_wins=True), expected)
    counts = tuple(numbers.count(m) for m in range(3))
    for indices in (indices_of(ids), {name: torch.tensor(i, dtype=torch.int32) for name, i in indices_of(ids).items()}):
        plan = RoutePlan.from_indices(indices, len(numbers))
        assert_same_plan(plan, dataclasses.replace(expected, row_counts=counts))


def test_indices_may_come_in_any_order_and_samples_pass_through():
    samples = torch.tensor([1, 0, 0, 1, 0, 1])
    expected = RoutePlan.from_modality_ids(IDS, NAMES, sample_ids=samples, sample_count=2)
    mixed = {"text": [2, 0], "image": torch.tensor([3]), "audio": (5, 1, 4)}
    plan = RoutePlan.from_indices(mixed, 6, sample_ids=samples, sample_count=2)
    assert_same_plan(plan, dataclasses.replace(expected, row_counts=(2, 1, 3)))
    assert_same_plan(RoutePlan.from_token_masks(masks_of(IDS), sample_ids=samples, sample_count=2), expected)


def test_the_rows_of_mask_matrices_are_samples():
    ids = IDS.view(2, 3)
    plan = RoutePlan.from_token_masks(masks_of(ids))
    rows, columns = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 2, 0, 1, 2])
    expected = RoutePlan.from_modality_ids(
        IDS, NAMES, sample_ids=rows, sample_count=2, positions=columns, max_position=2
    )
    assert_same_plan(plan, expected)
    one = RoutePlan.from_token_masks(masks_of(ids), sample_ids=rows * 0, sample_count=1)
    assert one.sample_count == 1 and not one.sample.any() and one.position.tolist() == [0, 2, 0, 1, 1, 2]


def test_of_overlapping_masks_the_last_wins_where_that_is_asked_for():
    masks = {"text": torch.tensor([1, 1, 0, 1]) == 1, "image": torch.tensor([0, 1, 1, 1]) == 1}
    masks["audio"] = torch.tensor([0, 0, 0, 1]) == 1
    said = "masks: expected each token in one mask, got a token in several; last_wins=True gives it to the last"
    assert message_of(RoutePlan.from_token_masks, masks) == said
    plan = RoutePlan.from_token_masks(masks, last_wins=True)
    assert_same_plan(plan, RoutePlan.from_modality_ids(torch.tensor([0, 1, 1, 2]), NAMES))


def test_tokens_in_no_mask_are_inert_where_that_is_asked_for():
    ids = torch.tensor([[0, 3, 2], [3, 0, 1]])
    said = (
        "masks: expected each token in a mask, got a token in none; leave_out=True gives it no row, inert=True a row "
        "that comes out as zero"
    )
    assert message_of(RoutePlan.from_token_masks, masks_of(ids)) == said
    plan = RoutePlan.from_token_masks(masks_of(ids), inert=True)
    assert plan.modalities == NAMES and plan.offsets.tolist() == [0, 2, 3, 4] and len(plan.code_offsets) == 3
    assert plan.cu_seqlens.tolist() == [[0, 1, 2], [2, 2, 3], [3, 4, 4]]
    assert plan.source.tolist() == [0, 4, 5, 2, 6, 6] and plan.modality.tolist() == [0, 0, 1, 2, 3, 3]
    for name, expected in (("sample", [0, 1, 1, 0]), ("position", [0, 1, 2, 2]), ("order", [0, 0, 1, 1])):
        assert getattr(plan, name).tolist() == [*expected, 0, 0], name
    x = torch.randn(2, 3, 4, requires_grad=True)
    packed = plan.pack(x)
    assert torch.equal(packed[:4], x.flatten(0, 1)[[0, 4, 5, 2]]) and not packed[4:].any()
    back = plan.unpack_interleaved(packed + 1).view(2, 3, 4)
    assert torch.equal(back, torch.where(ids[..., None] == 3, 0, x + 1))
    back.sum().backward()
    assert torch.equal(x.grad, (ids != 3)[..., None].float().expand(2, 3, 4))
    cls = torch.ones(6, dtype=torch.bool)
    assert RoutePlan.from_token_masks(masks_of(ids), inert=True, is_cls=cls).is_cls.tolist() == [True] * 4 + [False] * 2


@FEW
@given(st.lists(st.integers(0, 3), min_size=12, max_size=12))
def test_tokens_in_no_mask_have_no_row_where_that_is_asked_for(numbers):
    ids = torch.tensor(numbers).view(3, 4)
    plan = RoutePlan.from_token_masks(masks_of(ids), leave_out=True)
    segments = tuple(tuple((row == m).sum().item() for row in ids) for m in range(3))
    counts, real = tuple(map(sum, segments)), ids.flatten() < 3
    assert plan.row_counts == counts and plan.segment_lengths == segments and plan.capacity == sum(counts)
    assert plan.max_length == max(map(sum, zip(*segments, strict=True)))
    with_inert = RoutePlan.from_token_masks(masks_of(ids), inert=True)
    first = {
        name: getattr(with_inert, name)[: plan.capacity]
        for name in ("modality", "sample", "position", "code", "order", "is_cls", "source")
    }
    known = {"row_counts": counts, "segment_lengths": segments, "max_length": plan.max_length}
    assert_same_plan(plan, dataclasses.replace(with_inert, **first, **known))
    x = torch.randn(3, 4, 2)
    packed = plan.pack(x)
    assert torch.equal(packed, x.flatten(0, 1)[plan.source])
    assert torch.equal(plan.unpack_interleaved(packed).view_as(x), torch.where(real.view(3, 4, 1), x, 0))


def test_a_layer_refuses_unpacked_tokens_where_padding_has_no_row():
    ids = torch.tensor([[0, 3, 2], [3, 0, 1]])
    plan = RoutePlan.from_token_masks(masks_of(ids), leave_out=True)
    said = message_of(RelativeBiasAttention(8, 2), torch.randn(6, 8), plan)
    assert said.startswith("x: expected packed rows of the plan, [4, ")


def test_tokens_have_an_inert_row_or_none():
    said = "inert, leave_out: expected one of them at most, got both"
    assert message_of(RoutePlan.from_token_masks, masks_of(IDS), inert=True, leave_out=True) == said


def test_leaving_tokens_out_of_masks_on_a_device_reads_it_once(monkeypatch):
    reads = []
    monkeypatch.setattr(token_routes, "read_values", lambda values: reads.append(values.device) or [1] * values.numel())
    with no_synchronization():
        masks = {name: torch.empty(2, 3, dtype=torch.bool, device=DEVICE) for name in NAMES}
        plan = RoutePlan.from_token_masks(masks, leave_out=True)
    assert reads == [DEVICE] and plan.source.device == DEVICE and plan.row_counts == (2, 2, 2)


def test_neither_masks_nor_indices_on_a_device_are_read():
    with no_synchronization():
        masks = {name: torch.empty(2, 3, dtype=torch.bool, device=DEVICE) for name in NAMES}
        plan = RoutePlan.from_token_masks(masks, inert=True)
        assert plan.source.device == DEVICE and plan.row_counts == ()
        indices = {name: torch.empty(2, dtype=torch.int64, device=DEVICE) for name in NAMES}
        plan = RoutePlan.from_indices(indices, 6, device=DEVICE)
        assert plan.source.device == DEVICE and plan.row_counts == (2, 2, 2)
        assert RoutePlan.from_indices({"text": [1, 0], "image": [2]}, 3, device=DEVICE).row_counts == (2, 1)


def test_bad_masks_are_refused():
    good = torch.ones(3, dtype=torch.bool)
    for bad in (good.long(), good[:2], good[None, None], good.to("meta"), [True]):
        refused("masks['image']", RoutePlan.from_token_masks, {"text": ~good, "image": bad})
    refused("masks", RoutePlan.from_token_masks, {})


@pytest.mark.parametrize(
    ("lists", "tokens", "said"),
    [
        (([0, 1], [1]), 3, "indices: expected each of 3 tokens in one list, got [1] more than once and [2] in none"),
        (([0, 1], [2]), 4, "indices: expected each of 4 tokens in one list, got [3] in none"),
        (([0, 1], [2, 2]), 3, "indices: expected each of 3 tokens in one list, got [2] more than once"),
        (([0, 1], [1, 2]), 4, "indices: expected each of 4 tokens in one list, got [1] more than once and [3] in none"),
        (([0, 3], [2]), 3, "indices: expected tokens from 0 to 2, got [3]"),
        (([0, -1], [2]), 3, "indices: expected tokens from 0 to 2, got [-1]"),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", (list, torch.tensor))
def test_indices_that_overlap_or_leave_tokens_out_are_refused(form, lists, tokens, said):
    assert message_of(RoutePlan.from_indices, dict(zip(NAMES, map(form, lists), strict=False)), tokens) == said


def test_too_few_indices_on_a_device_are_refused():
    with no_synchronization():
        indices = {name: torch.empty(2, dtype=torch.int64, device=DEVICE) for name in NAMES}
        said = message_of(RoutePlan.from_indices, indices, 7, device=DEVICE)
    assert said == "indices: expected each of 7 tokens in one list, got 6 indices"


def test_an_empty_batch_of_masks_is_refused_by_the_name_of_what_was_given():
    said = "masks: expected at least one sample, got bool [0, 3] on cpu"
    assert message_of(RoutePlan.from_token_masks, masks_of(IDS.view(2, 3)[:0])) == said


def test_bad_index_tensors_are_refused():
    refused("indices['text']", RoutePlan.from_indices, {"text": torch.tensor([0.0, 1.0])}, 2)
    refused("indices", RoutePlan.from_indices, {}, 0)
