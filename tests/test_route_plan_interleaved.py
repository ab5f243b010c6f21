"""Plans from a modality id per token, and DropPath's factors that travel in a plan."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.contract import message_of, refused

from onepeace_fast import RoutePlan
from onepeace_fast.drop_path import draw_drop_path

FEW = settings(max_examples=60, deadline=None)
NAMES = ("text", "image", "audio")


@st.composite
def interleaved(draw) -> dict[str, list[int]]:
    count, samples = draw(st.integers(0, 20)), draw(st.integers(1, 3))
    tokens = [
        (draw(st.integers(0, 2)), draw(st.integers(0, samples - 1)), draw(st.integers(0, 30)), draw(st.booleans()))
        for _ in range(count)
    ]
    return {"tokens": tokens, "samples": samples}


def build(case: dict, dtype: torch.dtype = torch.int64) -> RoutePlan:
    modality, sample, position, is_cls = (torch.tensor([t[i] for t in case["tokens"]], dtype=dtype) for i in range(4))
    return RoutePlan.from_modality_ids(
        modality, NAMES, sample_ids=sample, sample_count=case["samples"], positions=position, is_cls=is_cls.bool(),
        max_position=30,
    )  # fmt: skip


@FEW
@given(interleaved(), st.sampled_from((torch.int32, torch.int64)))
def test_rows_are_grouped_by_modality_and_sample_with_cls_last(case, dtype):
    plan, tokens, samples = build(case, dtype), case["tokens"], case["samples"]
    order = []
    for m in range(3):
        for s in range(samples):
            mine = [i for i, token in enumerate(tokens) if token[:2] == (m, s)]
            order += [i for i in mine if not tokens[i][3]] + [i for i in mine if tokens[i][3]]
    assert plan.source.tolist() == order
    for i, name in enumerate(("modality", "sample", "position", "is_cls")):
        assert getattr(plan, name).tolist() == [tokens[row][i] for row in order], name
    assert torch.equal(plan.code, plan.position) and plan.code_offsets == (30,) * 3
    counts = [[sum(t[:2] == (m, s) for t in tokens) for s in range(samples)] for m in range(3)]
    firsts = [sum(map(sum, counts[:m])) for m in range(4)]
    assert plan.offsets.tolist() == firsts and plan.offsets.dtype == torch.int32
    assert plan.cu_seqlens.tolist() == [[firsts[m] + sum(counts[m][:s]) for s in range(samples + 1)] for m in range(3)]
    assert plan.cu_seqlens.dtype == torch.int32
    assert (plan.capacity, plan.sample_count) == (len(tokens), samples)
    for s in range(samples):
        assert plan.order[plan.sample == s].tolist() == list(range(sum(t[1] == s for t in tokens)))


@FEW
@given(interleaved())
def test_the_permutation_and_its_inverse(case):
    plan = build(case)
    x = torch.randn(len(case["tokens"]), 3, requires_grad=True)
    packed = plan.pack(x)
    assert torch.equal(packed, x[plan.source])
    restored = plan.unpack_interleaved(packed)
    assert torch.equal(restored, x)
    if case["tokens"]:
        weight = torch.randn_like(x)
        (restored * weight).sum().backward()
        assert torch.equal(x.grad, weight)


def test_defaults_are_one_sample_without_cls_at_the_tokens_own_places():
    plan = RoutePlan.from_modality_ids(torch.tensor([1, 0, 1, 0, 0]), ("text", "image"))
    assert plan.source.tolist() == [1, 3, 4, 0, 2] == plan.position.tolist()
    assert plan.sample_count == 1 and not plan.is_cls.any() and not plan.sample.any()
    assert plan.offsets.tolist() == [0, 3, 5] and plan.cu_seqlens.tolist() == [[0, 3], [3, 5]]
    assert plan.code_offsets == (4, 4) and plan.row_counts == () and plan.max_length == 0


@pytest.mark.parametrize(("ids", "wrong"), (([0, 1, 2, 0], [2]), ([-100, 1, 0, 5], [-100, 5])), ids=str)
def test_ids_out_of_range_are_named(ids, wrong):
    plan, bad, good = RoutePlan.from_modality_ids, torch.tensor(ids), torch.tensor([0, 1, 0, 1])
    assert message_of(plan, bad, ("text", "image")) == f"modality_ids: expected 0 to 1, got {wrong}"
    given = {"sample_ids": bad, "sample_count": 2}
    assert message_of(plan, good, ("text", "image"), **given) == f"sample_ids: expected 0 to 1, got {wrong}"


def test_several_samples_without_the_sample_of_each_token_are_refused():
    said = "sample_ids: expected the sample of each token with sample_count 2, got none"
    assert message_of(RoutePlan.from_modality_ids, torch.tensor([0, 1]), NAMES, sample_count=2) == said


@pytest.mark.parametrize("ids", ([0, 2], [-1, 0]), ids=str)
def test_ids_out_of_range_are_refused(ids):
    good, bad = torch.tensor([0, 1]), torch.tensor(ids)
    refused("modality_ids", RoutePlan.from_modality_ids, bad, ("text", "image"))
    refused("sample_ids", RoutePlan.from_modality_ids, good, ("text", "image"), sample_ids=bad, sample_count=2)
    RoutePlan.from_modality_ids(good, ("text", "image"), sample_ids=good, sample_count=2)


def test_bad_tensors_and_position_ids_past_the_largest_are_refused():
    ids = torch.tensor([0, 1])
    for bad in ([0, 6], [-1, 0]):
        options = {"positions": torch.tensor(bad), "max_position": 5}
        refused("positions", RoutePlan.from_modality_ids, ids, ("text", "image"), **options)
    refused("modality_ids", RoutePlan.from_modality_ids, ids.float(), NAMES)
    refused("modality_ids", RoutePlan.from_modality_ids, ids[None], NAMES)
    for name in ("sample_ids", "positions", "is_cls"):
        good = torch.zeros(2, dtype=torch.bool if name == "is_cls" else torch.int64)
        refused(name, RoutePlan.from_modality_ids, ids, NAMES, **{name: good[:1]})
        refused(name, RoutePlan.from_modality_ids, ids, NAMES, **{name: good.to("meta")})
        refused(name, RoutePlan.from_modality_ids, ids, NAMES, **{name: good.float()})


def test_with_drop_path_changes_nothing_else():
    plan = RoutePlan.from_lengths({"text": [2, 3]}, first_is_cls=True)
    drop_path = draw_drop_path([0.5], 2)
    other = plan.with_drop_path(drop_path)
    assert plan.drop_path is None and other.drop_path is drop_path and other.source is plan.source


def test_names_twice_indices_that_are_no_integers_and_codes_that_do_not_reach_are_refused():
    refused("modalities", RoutePlan.from_modality_ids, torch.zeros(2, dtype=torch.int64), ["a", "a"])
    refused("indices", RoutePlan.from_indices, {"a": [0.5, 1.7]}, 2)
    codes = torch.tensor([0, 7])
    refused("codes['a']", RoutePlan.from_lengths, {"a": [3]}, codes={"a": codes})
    refused("codes['a']", RoutePlan.from_lengths, {"a": [2]}, codes={"a": codes.float()})
    refused("codes", RoutePlan.from_lengths, {"a": [2]}, codes={"b": codes})
    refused("code_offsets", RoutePlan.from_lengths, {"a": [2]}, code_offsets={"b": 3})
