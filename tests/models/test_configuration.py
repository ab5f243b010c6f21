"""What follows from a configuration: rates, seeds, which parts there are and which branch has which."""

import pytest
import torch
from models._small import BACKENDS, Dtypes, batch_of, small_config, small_model, with_gradients
from torch import nn

from onepeace_fast import RoutePlan
from onepeace_fast.layers import transformer
from onepeace_fast.models import stack
from onepeace_fast.routing import branch_row_counts

BATCH = batch_of(text=[3, 1], image=(2, 2))


def stack_of(config, backend="fused"):
    return small_model(backend, config).encoder_wrapper.fusion_model


@pytest.mark.parametrize(
    ("layers", "rates"), [(1, [0.0]), (2, [0.0, 0.4]), (5, [0.0, 0.1, 0.2, 0.3, 0.4]), (40, None)], ids=str
)
def test_drop_path_grows_linearly_from_zero_to_the_configured_rate(layers, rates):
    found = stack_of(small_config(layers=layers, drop_path_rate=0.4)).drop_path_rates
    assert found == pytest.approx(rates or [0.4 * layer / 39 for layer in range(layers)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_pass_draws_by_its_own_stack_s_rates_in_training_alone(backend, monkeypatch):
    asked, draw = [], stack.draw_drop_path
    monkeypatch.setattr(
        stack, "draw_drop_path", lambda rates, samples: asked.append((list(rates), samples)) or draw(rates, samples)
    )
    model = small_model(backend, small_config(decoder={"drop_path_rate": 0.2, "layers": 2}, drop_path_rate=0.4))
    batch = batch_of(text=[5, 4, 3])
    masks = {"text": torch.tensor([[False, True, False, False, False, False]] * 3)}
    model.reconstruct(**batch, masks=masks)
    assert asked == []
    model.train().reconstruct(**batch, masks=masks)
    assert asked == [(pytest.approx([0.0, 0.4]), 3), (pytest.approx([0.0, 0.2]), 3)]


def test_all_seeds_of_dropout_differ_and_every_step_draws_anew():
    transformer = stack_of(small_config(layers=6, dropout=0.1)).train()
    steps = [transformer.draw_seeds(torch.device("cpu")) for _ in range(3)]
    assert all(seeds.shape == (6, 2) and seeds.dtype == torch.int64 for seeds in steps)
    assert torch.cat(steps).unique().numel() == 36
    torch.manual_seed(0)
    first = transformer.draw_seeds(torch.device("cpu"))
    torch.manual_seed(0)
    assert torch.equal(transformer.draw_seeds(torch.device("cpu")), first)
    assert transformer.eval().draw_seeds(torch.device("cpu")) is None
    assert stack_of(small_config()).train().draw_seeds(torch.device("cpu")) is None


def test_every_branch_of_every_layer_drops_by_the_configured_rate_and_a_seed_of_its_own(monkeypatch):
    seen = []
    for name in ("residual", "residual_layer_norm"):
        op = getattr(transformer, name)
        monkeypatch.setattr(
            transformer, name, lambda *a, op=op, **k: (seen.append((k["dropout"], int(k["seed"]))), op(*a, **k))[1]
        )
    model = small_model("fused", small_config(layers=3, dropout=0.25)).train()
    drawn, encoder = [], model.encoder_wrapper.fusion_model
    draw = encoder.draw_seeds
    monkeypatch.setattr(encoder, "draw_seeds", lambda device: drawn.append(draw(device)) or drawn[-1])
    model.encode(**BATCH)
    assert seen == [(0.25, seed) for seed in drawn[0].flatten().tolist()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_dropout_zeroes_its_share_of_a_branch_in_training_alone(backend, rate):
    config = small_config(layers=1, dropout=rate, layer_scale=None)
    layer = stack_of(config, backend).layers[0]
    with torch.no_grad():
        for part in (layer.self_attn.out_proj, layer.text_ffn[3]):
            part.weight.zero_()
            part.bias.fill_(1.0)
    x = torch.zeros(400, 48, dtype=torch.float64)
    for training in (True, False):
        layer.train(training)
        if backend == "fused":
            seeds = torch.tensor([3, 4]) if training and rate else None
            plan = RoutePlan.from_lengths({"text": [400]}, first_is_cls=False)
            out = layer(x, plan, (), None, seeds)
        else:
            out = layer(x[:, None], [("text", 0, 400)], None)
        # Either branch adds 0 or 1 / (1 - rate) to an element.
        dropped = rate if training else 0.0
        values, counts = out.mul(1 - dropped).round(decimals=9).unique(return_counts=True)
        shares = dict(zip(values.tolist(), (counts / out.numel()).tolist(), strict=True))
        expected = {0.0: dropped**2, 1.0: 2 * dropped * (1 - dropped), 2.0: (1 - dropped) ** 2}
        assert shares == pytest.approx({value: share for value, share in expected.items() if share}, abs=0.02)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gamma_1_scales_attention_and_gamma_2_the_ffn(backend, dropout):
    model = small_model(backend, small_config(layers=1, dropout=dropout)).train()
    layer = model.encoder_wrapper.fusion_model.layers[0]
    for gamma, silenced, other in (("gamma_1", "self_attn", "text_ffn"), ("gamma_2", "text_ffn", "self_attn")):
        before = layer.get_parameter(gamma).detach().clone()
        with torch.no_grad():
            layer.get_parameter(gamma).zero_()
        torch.manual_seed(0)
        gradients = with_gradients(model, BATCH)
        with torch.no_grad():
            layer.get_parameter(gamma).copy_(before)
        of = {n: [g for name, g in gradients.items() if f"layers.0.{n}." in name] for n in (silenced, other)}
        assert of[silenced] and of[other]
        assert not any(gradient.any() for gradient in of[silenced])
        assert any(gradient.any() for gradient in of[other])


OPTIONAL = {
    "sub_layer_norm": lambda layer: layer.self_attn.ln,
    "attention_layer_norm": lambda layer: layer.attn_ln,
    "head_scale": lambda layer: layer.self_attn.c_attn,
    "ffn_layer_norm": lambda layer: layer.text_ffn[2] if isinstance(layer.text_ffn[2], nn.LayerNorm) else None,
}


@pytest.mark.parametrize("field", OPTIONAL)
@pytest.mark.parametrize("wanted", [False, True])
def test_a_part_is_there_exactly_where_the_configuration_has_it(field, wanted):
    layer = stack_of(small_config(layers=1, **{field: wanted})).layers[0]
    assert (OPTIONAL[field](layer) is not None) == wanted


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_part_of_the_configuration_takes_part_in_the_output(backend):
    everything = dict.fromkeys(("head_scale", "attention_layer_norm", "bias_table_per_layer"), True)
    model = small_model(backend, small_config(layers=2, **everything))
    gradients = with_gradients(model, BATCH)
    used = {
        name for name, _ in model.named_parameters() if "encoder_wrapper.fusion_model" in name and "audio" not in name
    }
    assert used <= set(gradients) and all(gradients[name].any() for name in used)
    tables = [name for name in gradients if "text_adapter.rel_pos_table_list" in name]
    assert len(tables) == 2 and all(gradients[name].any() for name in tables)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_references_softmax_runs_in_at_least_float32_in_a_model_of_any_dtype(dtype):
    model, batch = small_model("reference", dtype=dtype), batch_of(text=[3, 1], image=(2, 2), dtype=dtype)
    with Dtypes() as dtypes:
        model.encode(**batch)
    assert dtypes.seen.get("_softmax") == {torch.promote_types(torch.float32, dtype)}


@pytest.mark.parametrize("counts", [[2049], [1500, 549, 4], [70001]], ids=str)
def test_rows_of_a_branch_are_counted_exactly_past_what_half_precision_holds(counts):
    ((attention, feed_forward),) = branch_row_counts(torch.ones(1, 2, len(counts)), [counts])
    assert attention == feed_forward == (sum(counts),)
    plan = RoutePlan.from_lengths({"text": counts}, first_is_cls=True)
    before = plan.with_drop_path(torch.full((1, 2, len(counts)), 1.25)).branch_row_counts
    assert before == (((sum(counts),), (sum(counts),)),)
