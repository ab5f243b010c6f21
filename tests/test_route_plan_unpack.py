"""Plans without CLS, and what ``unpack`` makes of every kind of plan."""

import pytest
import torch
import torch.nn.functional as F
from support.contract import refused

from onepeace_fast import RoutePlan, relative_bias_attention
from onepeace_fast.drop_path import branches


def attention_with_relative_bias(qkv, lengths, bias, code_offsets):
    """Of one sample, by PyTorch: each modality's bias by the distance of its tokens, none between modalities."""
    q, k, v = qkv.permute(1, 2, 0, 3)
    mask = torch.zeros(q.shape[0], sum(lengths), sum(lengths), dtype=qkv.dtype)
    start = 0
    for length, vector, offset in zip(lengths, bias, code_offsets, strict=True):
        place = torch.arange(length)
        mask[:, start : start + length, start : start + length] = vector[:, place[:, None] - place + offset]
        start += length
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1)


def test_a_model_without_cls_agrees_with_plain_attention_with_relative_bias():
    lengths, widths, heads = {"text": [3, 5], "image": [4, 2]}, {"text": 6, "image": 4}, 2
    masks = {name: torch.arange(widths[name]) < torch.tensor(row)[:, None] for name, row in lengths.items()}
    generator = torch.Generator().manual_seed(0)
    padded = {n: torch.randn(2, w, 3 * heads * 8, generator=generator).double() for n, w in widths.items()}
    bias = [torch.randn(heads, 2 * w - 1 + 3, generator=generator).double() for w in widths.values()]
    plans = [
        RoutePlan.from_masks(masks, first_is_cls=False),
        RoutePlan.from_lengths(lengths, widths=widths, first_is_cls=False),
        RoutePlan.from_masks(masks, first_is_cls=False, capacity=20),
    ]
    for plan in plans:
        assert not plan.is_cls.any() and plan.code_offsets == (5, 3)
        found = relative_bias_attention(
            plan.pack(padded).view(plan.capacity, 3, heads, 8), cu_seqlens=plan.cu_seqlens, modality=plan.modality,
            code=plan.code, is_cls=plan.is_cls, bias=bias, code_offsets=plan.code_offsets,
        )  # fmt: skip
        unpacked = plan.unpack(found.flatten(1))
        for sample in range(2):
            counts = [lengths[name][sample] for name in lengths]
            rows = torch.cat([padded[name][sample, :n] for name, n in zip(lengths, counts, strict=True)])
            expected = attention_with_relative_bias(rows.view(-1, 3, heads, 8), counts, bias, plan.code_offsets)
            own = torch.cat([unpacked[name][sample, :n] for name, n in zip(lengths, counts, strict=True)])
            torch.testing.assert_close(own, expected.flatten(1), rtol=1e-12, atol=1e-12)
        assert plan.order.tolist()[:3] == [0, 1, 2]


@pytest.mark.parametrize("positions", [None, [7, 0, 3, 11, 2, 5, 9, 1, 4]])
def test_interleaved_tokens_without_cls_agree_with_plain_attention_with_relative_bias(positions):
    modality, sample = torch.tensor([0, 1, 0, 0, 1, 1, 0, 1, 0]), torch.tensor([0, 0, 1, 0, 1, 0, 1, 0, 1])
    generator, heads = torch.Generator().manual_seed(0), 2
    positions = positions and torch.tensor(positions)
    plan = RoutePlan.from_modality_ids(
        modality, ("text", "image"), sample_ids=sample, sample_count=2, positions=positions,
        max_position=None if positions is None else 11,
    )  # fmt: skip
    assert not plan.is_cls.any()
    x = torch.randn(9, 3 * heads * 8, generator=generator).double()
    bias = [torch.randn(heads, 2 * offset + 4, generator=generator).double() for offset in plan.code_offsets]
    found = plan.unpack_interleaved(
        relative_bias_attention(
            plan.pack(x).view(9, 3, heads, 8), cu_seqlens=plan.cu_seqlens, modality=plan.modality, code=plan.code,
            is_cls=plan.is_cls, bias=bias, code_offsets=plan.code_offsets,
        ).flatten(1)
    )  # fmt: skip
    place = torch.arange(9) if positions is None else positions
    distance, same = place[:, None] - place, modality[:, None] == modality
    vectors = [vector[:, distance + plan.code_offsets[0]] for vector in bias]
    mask = torch.where(same, torch.where(modality[:, None] == 0, *vectors), 0.0)
    mask = mask.masked_fill(sample[:, None] != sample, float("-inf"))
    q, k, v = x.view(9, 3, heads, 8).permute(1, 2, 0, 3)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1).flatten(1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_no_token_is_cls_unless_that_is_said():
    mask = torch.ones(2, 3, dtype=torch.bool)
    ids = torch.zeros(6, dtype=torch.int64)
    unsaid = [
        RoutePlan.from_masks({"text": mask}),
        RoutePlan.from_lengths({"text": [3, 3]}),
        RoutePlan.from_modality_ids(ids, ("text",)),
    ]
    assert not any(plan.is_cls.any() for plan in unsaid)
    said = RoutePlan.from_lengths({"text": [3, 3]}, first_is_cls=True)
    assert said.is_cls.tolist() == [False, False, True] * 2 and said.position.tolist() == [1, 2, 0] * 2


def test_unpack_undoes_pack_for_a_refilled_plan_and_leaves_dropped_samples_zero():
    masks = [torch.tensor([[True, True, False], [True, True, True]]), torch.tensor([[True, False, False]] * 2)]
    first, second = (RoutePlan.from_masks({"text": mask}, first_is_cls=True, capacity=6) for mask in masks)
    x = torch.randn(2, 3, 4)
    first.copy_(second)
    assert torch.equal(first.unpack(first.pack({"text": x}))["text"], x * masks[1][..., None])
    for capacity in (None, 6):
        whole = RoutePlan.from_masks({"text": masks[0]}, first_is_cls=True, capacity=capacity)
        part = branches(whole.with_drop_path(torch.tensor([[[0.0, 2.0], [2.0, 2.0]]])))[0].attention.plan
        expected = x * masks[0][..., None] * torch.tensor([0.0, 1.0])[:, None, None]
        assert torch.equal(part.unpack(part.pack({"text": x}))["text"], expected)


def test_unpack_refuses_rows_that_are_not_the_plans():
    plan = RoutePlan.from_lengths({"text": [2, 3]}, first_is_cls=True)
    interleaved = RoutePlan.from_modality_ids(torch.tensor([0, 1, 0]), ("text", "image"))
    for packed in (torch.zeros(4, 8), torch.zeros(5), torch.zeros(5, 2, 4)):
        refused("packed", plan.unpack, packed)
    refused("packed", interleaved.unpack_interleaved, torch.zeros(2, 8))
    refused("plan", interleaved.unpack, torch.zeros(3, 8))
    refused("plan", interleaved.pack, {"text": torch.zeros(1, 3, 8)})
    refused("plan", plan.unpack_interleaved, torch.zeros(5, 8))
    single = RoutePlan.from_modality_ids(torch.tensor([0, 0, 0]), ("text",))
    assert torch.equal(single.unpack(torch.ones(3, 8))["text"], torch.ones(1, 3, 8))
