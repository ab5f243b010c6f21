"""DropPath as skipped work: how factors are drawn, what each branch then computes, and what stays as it is."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from models._small import assert_close, batch_of, layer_inputs, small_config, small_model
from support.contract import refused
from support.plans import naive_layout, whole_rows

from onepeace_fast import RoutePlan
from onepeace_fast.drop_path import Branch, Branches, branches, draw_drop_path
from onepeace_fast.layers import transformer

LENGTHS = {"text": [5, 2, 7, 3], "image": [4, 4], "audio": [6, 0, 3]}
SAMPLES = {"text": [0, 1, 2, 3], "image": [3, 1], "audio": [0, 1, 2]}
DROP_PATH = torch.tensor(
    [
        [[1.0, 1, 1, 1], [1, 1, 1, 1]],
        [[0, 1.25, 1.25, 0], [1.25, 0, 1.25, 1.25]],
        [[0, 0, 0, 0], [0, 2, 0, 0]],
    ]
)
FIELDS = ("modality", "sample", "position", "code", "order", "is_cls", "source")


def whole_plan(**keywords):
    return RoutePlan.from_lengths(LENGTHS, samples=SAMPLES, **keywords, first_is_cls=True)


def on_the_device(plan):
    """The same plan, of which the host knows nothing."""
    return dataclasses.replace(plan, branch_row_counts=())


def test_drop_path_is_zero_or_the_reciprocal_of_the_rate_of_computed_samples():
    rates, samples = [0.0, 0.1, 0.4], 4000
    drop_path = draw_drop_path(rates, samples, torch.Generator().manual_seed(1))
    assert drop_path.shape == (3, 2, samples) and drop_path.dtype == torch.float32
    assert (drop_path[0] == 1).all()
    for layer, rate in enumerate(rates):
        computed = drop_path[layer] != 0
        assert torch.equal(drop_path[layer][computed], torch.full_like(drop_path[layer][computed], 1 / (1 - rate)))
        deviation = math.sqrt(rate * (1 - rate) / samples)
        for branch in range(2):
            assert abs(computed[branch].float().mean().item() - (1 - rate)) <= 4.5 * deviation


def test_branches_layers_and_samples_are_drawn_independently():
    computed = draw_drop_path([0.5, 0.5], 4000, torch.Generator().manual_seed(2)) != 0
    flat = computed.flatten(0, 1).float() - 0.5
    correlation = flat @ flat.t() / 4000 * 4
    assert (correlation - torch.diag(correlation.diagonal())).abs().max() < 4.5 / math.sqrt(4000)
    assert ((flat[:, 1:] * flat[:, :-1]).mean(1) * 4).abs().max() < 4.5 / math.sqrt(4000)


def test_a_generator_repeats_its_draw():
    draws = [draw_drop_path([0.5], 50, torch.Generator().manual_seed(s)) for s in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_a_draw_does_not_follow_the_process_s_default_dtype_or_device():
    expected = draw_drop_path([0.3], 9, torch.Generator().manual_seed(1))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert torch.equal(draw_drop_path([0.3], 9, torch.Generator().manual_seed(1)), expected)
    finally:
        torch.set_default_dtype(before)


def test_a_rate_of_one_is_refused():
    refused("rates", draw_drop_path, [1.0], 10)


@pytest.mark.parametrize("capacity", [None, 50])
@pytest.mark.parametrize("known", [True, False], ids=["rows known", "rows on the device"])
def test_a_branch_is_the_plan_of_its_computed_samples(known, capacity):
    plan = whole_plan(capacity=capacity).with_drop_path(DROP_PATH)
    known = known and capacity is None
    layout = naive_layout(whole_rows(LENGTHS), SAMPLES)
    for layer, pair in enumerate(branches(plan if known else on_the_device(plan))):
        for which, branch in enumerate(pair):
            computed = [s for s in range(4) if DROP_PATH[layer, which, s]]
            rows = [i for i, token in enumerate(layout.tokens) if token.sample in computed]
            counts = [sum(layout.tokens[i].modality == m for i in rows) for m in range(3)]
            part = branch.plan
            assert part.offsets.tolist() == [sum(counts[:m]) for m in range(4)]
            assert torch.equal(branch.drop_path, DROP_PATH[layer, which]) and branch.sample is plan.sample
            for m in range(3):
                segments = [(layout.tokens[i].modality, layout.tokens[i].sample) for i in rows]
                lengths = [segments.count((m, s)) for s in range(4)]
                assert part.cu_seqlens[m].diff().tolist() == lengths
            if known and len(computed) == 4:
                assert branch.row_index is None and part is plan
                continue
            assert part.row_counts == (tuple(counts) if known else ())
            assert branch.row_index.dtype == torch.int32 and branch.row_index[: len(rows)].tolist() == rows
            assert len(branch.row_index) == len(part.sample) == (len(rows) if known else plan.capacity)
            assert branch.row_index.unique().numel() == len(branch.row_index)
            for name in FIELDS:
                mine, whole = getattr(part, name), getattr(plan, name)
                assert mine.dtype == whole.dtype and torch.equal(mine[: len(rows)], whole[rows]), name
            inert = {name: getattr(part, name)[len(rows) :].unique().tolist() for name in FIELDS}
            assert all(value == [] for value in inert.values()) or inert == {
                "modality": [3], "sample": [0], "position": [0], "code": [0], "order": [0], "is_cls": [False],
                "source": [plan.padded_rows],
            }  # fmt: skip


def stack_inputs(**encoder):
    """A layer's inputs: packed rows of four samples, their plan and bias vectors, and a stack without DropPath."""
    model = small_model("fused", small_config(layers=1, **encoder))
    batch = batch_of(text=[7, 2, 5, 4], image=(4, 3), audio=[9, 4, 6, 5])
    return model.encoder_wrapper.fusion_model.layers[0].train(), *layer_inputs(model, batch)


def run(layer, x, route, bias):
    """Output and all gradients of a layer."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    out = layer(x, route, bias)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out).cos()).sum().backward()
    return {"out": out.detach(), "x": x.grad, **{name: p.grad.clone() for name, p in layer.named_parameters()}}


def unskipped(plan, drop_path):
    """The same factors with every row computed."""
    return Branches(*(Branch(plan, None, factors, plan.sample) for factors in drop_path))


CHOICES = {
    "mixed": [[0.0, 1.25, 1.25, 0.0], [1.25, 0.0, 1.25, 0.0]],
    "all computed": [[1.25] * 4, [2.0] * 4],
    "none computed": [[0.0] * 4, [0.0] * 4],
    "one branch": [[1.0] * 4, [0.0, 0.0, 2.0, 0.0]],
    "other branch": [[0.0, 0.0, 2.0, 0.0], [1.0] * 4],
}


@pytest.mark.parametrize("known", [True, False], ids=["rows known", "rows on the device"])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("encoder", [{}, {"head_scale": True, "layer_scale": None}], ids=["plain", "head scale"])
def test_skipping_gives_what_multiplying_by_zero_gives(choice, known, encoder):
    layer, x, plan, bias = stack_inputs(**encoder)
    drop_path = torch.tensor(CHOICES[choice])
    given = plan.with_drop_path(drop_path[None])
    (route,) = branches(given if known else on_the_device(given))
    expected, got = run(layer, x, unskipped(plan, drop_path), bias), run(layer, x, route, bias)
    assert set(got) == set(expected) and len(got) > 20
    assert_close(got, expected, 1e-12)
    dropped = (drop_path == 0).all(0)[plan.sample.long()]
    assert torch.equal(got["out"][dropped], x[dropped])


def test_dropped_rows_are_not_read_and_reach_no_gradient():
    layer, x, plan, bias = stack_inputs()
    drop_path = torch.tensor([[0.0, 1.25, 1.25, 0.0]] * 2)
    (route,) = branches(plan.with_drop_path(drop_path[None]))
    expected = run(layer, x, route, bias)
    spoiled = x.clone()
    dropped = (drop_path[0] == 0)[plan.sample.long()]
    spoiled[dropped] = math.nan
    got = run(layer, spoiled, route, bias)
    assert got["out"][dropped].isnan().all()
    for name in set(got) - {"out", "x"}:
        assert torch.equal(got[name], expected[name]), name
    for name in ("out", "x"):
        assert torch.equal(got[name][~dropped], expected[name][~dropped]), name


def test_products_run_on_the_computed_rows_alone(monkeypatch):
    layer, x, plan, bias = stack_inputs()
    drop_path = torch.tensor([[0.0, 1.25, 1.25, 0.0], [1.25, 0.0, 0.0, 0.0]])
    (route,) = branches(plan.with_drop_path(drop_path[None]))
    seen = []
    linear, joined, ffn = F.linear, transformer.linear_residual, transformer.routed_ffn
    monkeypatch.setattr(F, "linear", lambda z, *rest: (seen.append(len(z)), linear(z, *rest))[1])
    monkeypatch.setattr(
        transformer, "linear_residual", lambda x, z, *rest, **k: (seen.append(len(z)), joined(x, z, *rest, **k))[1]
    )
    monkeypatch.setattr(transformer, "routed_ffn", lambda z, *rest, **k: (seen.append(len(z)), ffn(z, *rest, **k))[1])
    layer(x, route, bias)
    rows = [int((factors != 0)[plan.sample.long()].sum()) for factors in drop_path]
    assert seen == [rows[0]] * 4 + [rows[1]] and 0 < rows[1] < rows[0] < len(x)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_dropout_of_a_computed_row_does_not_depend_on_what_is_skipped(dropout):
    layer, x, plan, bias = stack_inputs(dropout=dropout)
    drop_path = torch.tensor([[0.0, 1.25, 1.25, 1.25], [1.25, 0.0, 1.25, 1.25]])
    seeds = torch.tensor([5, 6])
    (route,) = branches(plan.with_drop_path(drop_path[None]))
    results = [layer(x, r, bias, None, seeds if dropout else None) for r in (route, unskipped(plan, drop_path))]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_a_refilled_plan_takes_its_new_factors_along():
    plan = whole_plan(capacity=60).with_drop_path(DROP_PATH)
    other = whole_plan(capacity=60).with_drop_path(DROP_PATH.flip(0))
    plan.copy_(other)
    for got, want in zip(branches(plan), branches(other), strict=True):
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a.row_index, b.row_index) and torch.equal(a.plan.offsets, b.plan.offsets)


def test_factors_beside_packed_rows_are_refused():
    layer, x, plan, bias = stack_inputs()
    refused("drop_path: expected none with packed rows, got factors; ", layer, x, plan, bias, torch.ones(2, 4))
