"""On a CPU the fused backend calls modules on packed rows, and the automatic one looks at the lengths first."""

import math

import pytest
import torch
from models._small import assert_close, batch_of, image_batch, layer_inputs, small_config, small_model, with_gradients
from torch.utils._python_dispatch import TorchDispatchMode

from onepeace_fast import RoutePlan, use_backend
from onepeace_fast.backend import ENVIRONMENT_VARIABLE
from onepeace_fast.layers import transformer
from onepeace_fast.models import stack
from onepeace_fast.models.choice import COST_OF_A_PASS, COST_OF_PACKING, COST_WITH_GRADIENTS, LEAST_SHARE, choose
from onepeace_fast.models.passes import PaddedTokens
from onepeace_fast.ops import pair_bias
from onepeace_fast.ops.relative_bias_attention import RELATIVE_BIAS_ATTENTION
from onepeace_fast.ops.routed_ffn import ROUTED_FFN

pytestmark = pytest.mark.usefixtures("modules_on_a_cpu")
RAGGED = {"text": [1, 0, 9], "image": (2, 3), "audio": [4, 11]}
SAMPLES = {"text": [2, 0, 1], "image": [0, 3], "audio": [1, 3]}


@pytest.fixture
def ffn_ops(monkeypatch):
    """The calls of the FFN's op."""
    calls, call = [], ROUTED_FFN.run
    monkeypatch.setattr(ROUTED_FFN, "run", lambda given: (calls.append(given), call(given))[1])
    return calls


def test_modules_on_packed_rows_agree_with_the_reference_for_any_pairing(ffn_ops):
    batch = batch_of(**RAGGED)
    want, got = (with_gradients(small_model(backend), batch, samples=SAMPLES) for backend in ("reference", "fused"))
    assert_close(got, want, 1e-9)
    assert not ffn_ops


def test_a_large_step_with_gradients_takes_the_ops_which_keep_less(ffn_ops, monkeypatch):
    monkeypatch.setattr(transformer, "FEW_NUMBERS", 8)
    model, batch = small_model("fused"), batch_of(text=[5, 6])
    with torch.no_grad():
        model.encode(**batch)
    assert not ffn_ops
    model.encode(**batch)
    assert len(ffn_ops) == len(model.encoder.fusion_model.layers)


def test_drop_path_and_dropout_take_the_ops(ffn_ops):
    for settings in ({"drop_path_rate": 0.5}, {"dropout": 0.5}):
        torch.manual_seed(0)
        small_model("fused", small_config(**settings)).train().encode(**batch_of(text=[5, 6]))
        assert ffn_ops
        ffn_ops.clear()


def test_autocast_and_compiled_code_take_the_ops(ffn_ops):
    model = small_model("fused", dtype=torch.float32)
    x, plan, bias = layer_inputs(model, batch_of(text=[5, 6], dtype=torch.float32))
    layer = model.encoder.fusion_model.layers[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer(x, plan, bias)
    assert len(ffn_ops) == 1
    graphs = []
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    with torch.no_grad():
        compiled(x, plan, bias)
    assert any("routed_ffn" in str(node.target) for node in graphs[0].graph.nodes)


def test_inert_rows_stay_zero_where_a_plan_has_more_than_it_needs(ffn_ops):
    model = small_model("fused")
    x, plan, bias = layer_inputs(model, batch_of(text=[5, 6]))
    wide = RoutePlan.from_lengths({"text": [6, 7]}, first_is_cls=True, capacity=plan.capacity + 3)
    padded = torch.cat([x, x.new_zeros(3, x.shape[1])])
    with torch.no_grad():
        got = model.encoder.fusion_model(padded, wide, [bias])
        torch.testing.assert_close(got[:-3], model.encoder.fusion_model(x, plan, [bias]), rtol=1e-12, atol=1e-12)
    assert not got[-3:].any() and ffn_ops


def passes_of(*widths_and_lengths):
    """Passes of one modality each."""
    return [
        {
            "text": PaddedTokens(
                torch.zeros(len(lengths), width, 1), torch.zeros(len(lengths), width), lengths, None, width
            )
        }
        for width, lengths in widths_and_lengths
    ]


@torch.no_grad()
def test_the_choice_weighs_what_packing_saves_against_what_it_costs(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    config = small_config(embed_dim=512, ffn_embed_dim=2048, attention_heads=8).encoder
    of_a_row = 2 * 512 * (4 * 512 + 3 * 2048)

    def chosen(*widths_and_lengths, samples=None):
        return choose(config, passes_of(*widths_and_lengths), samples)

    assert chosen((12, [12])) == ("reference", 12, 12)
    assert chosen((20, [20, 5])) == ("fused", 40, 25)
    packed = 1000
    least = math.ceil(packed * (1 + LEAST_SHARE) + COST_OF_PACKING / of_a_row)
    assert chosen((least, [packed])).backend == "fused"
    assert chosen((least - 1, [packed])).backend == "reference"
    further = 1 + math.ceil((COST_OF_PACKING + LEAST_SHARE * 20 * of_a_row) / COST_OF_A_PASS)
    assert chosen(*[(2, [2])] * further).backend == "fused", "one call for several passes"
    assert chosen(*[(2, [2])] * (further - 1)).backend == "reference"
    assert chosen((4, [4, 4]), samples={"text": [0, 1]}).padded_tokens == 8
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    least = math.ceil(packed * (1 + LEAST_SHARE) + 3 * COST_OF_PACKING / of_a_row)
    assert chosen((least, [packed])).backend == "fused", "three threads shorten the products alone"
    assert chosen((least - 1, [packed])).backend == "reference"
    with torch.enable_grad():
        least = math.ceil(packed * (1 + LEAST_SHARE) + 3 * COST_WITH_GRADIENTS * COST_OF_PACKING / of_a_row)
        assert chosen((least, [packed])).backend == "fused", "the backward pass saves more products than it costs"
        assert chosen((least - 1, [packed])).backend == "reference"
    narrow = small_config(embed_dim=32, ffn_embed_dim=64, attention_heads=2).encoder
    assert choose(narrow, passes_of((20, [20, 5])), None).backend == "reference", "so narrow rows cost nothing"


@pytest.fixture
def padded_runs(monkeypatch):
    """The passes that the reference ran."""
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    runs, padded = [], stack.encode_padded
    monkeypatch.setattr(stack, "encode_padded", lambda *given: (runs.append(given), padded(*given))[1])
    return runs


@pytest.mark.parametrize(("lengths", "padded"), [([6, 6], 1), ([30, 29], 1), ([9, 2], 0)])
def test_the_automatic_backend_changes_no_result(lengths, padded, padded_runs, monkeypatch):
    monkeypatch.setattr("onepeace_fast.models.choice.COST_OF_PACKING", 0)  # or so small a model is never packed
    batch = batch_of(text=lengths)
    got = with_gradients(small_model(None), batch)
    assert len(padded_runs) == padded
    assert_close(got, with_gradients(small_model("fused"), batch), 1e-9)
    assert len(padded_runs) == padded, "who asks for the fused backend gets it"
    with torch.no_grad():  # padding too
        assert_close(*(small_model(backend).encode(**batch) for backend in (None, "fused")), 1e-9)


def test_nothing_is_chosen_where_one_was_asked_for_or_random_numbers_would_differ(padded_runs, monkeypatch):
    batch = batch_of(text=[6, 6])
    model = small_model(None)
    with use_backend("fused"):
        model.encode(**batch)
    small_model(None, small_config(dropout=0.5)).train().encode(**batch)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "fused")
    model.encode(**batch)
    assert not padded_runs
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    model.encode(**batch)
    assert len(padded_runs) == 1


@pytest.fixture
def attention_ops(monkeypatch):
    """The calls of attention's op."""
    calls, call = [], RELATIVE_BIAS_ATTENTION.run
    monkeypatch.setattr(RELATIVE_BIAS_ATTENTION, "run", lambda given: (calls.append(given), call(given))[1])
    return calls


@pytest.mark.parametrize("tables", ["shared", "per layer"])
@pytest.mark.parametrize("sizes", [RAGGED, {"text": [7, 7, 7]}, {"image": (2, 2)}, {"text": [7, 2], "image": (2, 3)}])
def test_few_pairs_attend_by_plain_pytorch_as_the_op_does(sizes, tables, attention_ops, monkeypatch):
    batch = batch_of(**sizes)
    config = small_config(bias_table_per_layer=tables == "per layer", head_scale=tables == "shared")
    given = {"samples": SAMPLES} if sizes is RAGGED else {}
    with torch.no_grad():
        alone = small_model("fused", config).encode(**batch, **given)
    got = with_gradients(small_model("fused", config), batch, **given)
    assert not attention_ops
    monkeypatch.setattr(pair_bias, "PAIRS_KEPT", 0)
    want = with_gradients(small_model("fused", config), batch, **given)
    with torch.no_grad():
        assert_close(alone, small_model("fused", config).encode(**batch, **given), 1e-12)
    assert attention_ops
    assert_close(got, want, 1e-11)


def test_an_attention_or_a_layer_of_one_s_own_gets_the_plan(attention_ops):
    class Own(transformer.SelfAttention):
        def forward(self, z, route, bias):
            assert isinstance(route, RoutePlan)
            return super().forward(z, route, bias)

    model, batch = small_model("fused"), batch_of(text=[5, 6])
    want = with_gradients(model, batch)
    assert not attention_ops
    model.encoder.fusion_model.layers[0].self_attn.__class__ = Own
    assert_close(with_gradients(model, batch), want, 1e-11)
    assert len(attention_ops) == 1


def test_codes_that_a_vector_does_not_cover_are_refused():
    model = small_model("fused")
    x, plan, bias = layer_inputs(model, batch_of(text=[5, 6]))
    for wrong, message in (
        ([vector[:, 4:] for vector in bias], "code: expected codes of modality 0 to differ by"),
        ([vector[1:] for vector in bias], r"bias\[0\]: expected floating point \[3, 4 or more\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model.encoder.fusion_model(x, plan, [wrong])


def test_a_mode_sees_the_op_of_attention_and_a_profile_what_runs_without_it():
    model, image = small_model("fused"), image_batch(2, 2)
    seen: list[str] = []

    class Looker(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            seen.append(function.name())
            return function(*arguments, **(keywords or {}))

    with torch.no_grad(), Looker():
        model.encode(image=image)
    assert seen.count("onepeace_fast::relative_bias_attention") == len(model.encoder.fusion_model.layers)
    with torch.no_grad(), torch.profiler.profile() as profile:
        model.encode(image=image)
    names = {event.key for event in profile.key_averages()}
    assert "aten::linear" in names and "onepeace_fast::relative_bias_attention" not in names
