"""The packed encoder over the kernels: it computes what the baseline does, and skips what DropPath drops."""

import functools

import pytest
import torch
from models._small import assert_close, batch_of, gradients_of, small_config, small_model, valid_tokens, weighted_sum
from support.graphs import captured
from support.kernels import DEVICE, REPEATS, first
from support.tiles import small_tiles

from onepeace_fast import RoutePlan, gated_sub_ln, layer_norm, residual, residual_layer_norm
from onepeace_fast.config import TransformerConfig
from onepeace_fast.drop_path import Branch, Branches, branches
from onepeace_fast.kernels import launch
from onepeace_fast.layers.transformer import TransformerLayer

KEEP = torch.tensor([[[0.0, 1.25, 1.25], [0.0, 0.0, 1.25]], [[1.25, 0.0, 0.0], [0.0, 0.0, 0.0]]])


def batch(**keywords):
    made = batch_of(text=[7, 2, 5], image=(3, 3), audio=[9, 4, 6], dtype=torch.float32, **keywords)
    return {name: value.to(DEVICE) for name, value in made.items()}


def results(backend, seed=0, **encoder):
    """Outputs at tokens and all gradients of a small model in training, from one seed."""
    model = small_model(backend, small_config(**encoder), dtype=torch.float32).to(DEVICE).train()
    torch.manual_seed(seed)
    outputs = model.encode(**batch())
    valid = valid_tokens(batch())
    gradients = gradients_of(model, weighted_sum(outputs, valid))
    return {**{name: value[valid[name]].detach() for name, value in outputs.items()}, **gradients}


@pytest.fixture
def launched(monkeypatch):
    """Names of the modules whose kernels are launched."""
    names = []
    original = launch.Configuration.launch

    def counting(self, grid):
        names.append(self.kernel.fn.__module__.rsplit(".", 1)[-1] if hasattr(self.kernel, "fn") else "")
        return original(self, grid)

    monkeypatch.setattr(launch.Configuration, "launch", counting)
    return names


OPTIONS = {
    "plain": {},
    "drop path": {"drop_path_rate": 0.5, "layers": 3},
    "checkpointed": {"drop_path_rate": 0.5, "layers": 3, "checkpoint_activations": True},
    "head scale, no LayerScale": {"head_scale": True, "layer_scale": None},
    "norm behind attention": {"attention_layer_norm": True, "sub_layer_norm": False},
    "no norm in the FFN": {"ffn_layer_norm": False},
}
SELDOM = ("checkpointed", "plain", "norm behind attention", "no norm in the FFN")


@pytest.mark.parametrize(
    "options",
    first([pytest.param(name, marks=[pytest.mark.slow] if name in SELDOM else []) for name in sorted(OPTIONS)]),
)
def test_outputs_and_gradients_are_the_baselines(options, launched):
    expected = results("reference", **OPTIONS[options])
    assert not launched
    got = results("fused", **OPTIONS[options])
    assert {"layer_norm", "residual", "gated_sub_ln"} <= set(launched)
    assert_close(got, expected, 2e-4)


def layer_inputs():
    """A layer, packed rows of three samples, their plan and bias vectors."""
    model = small_model("fused", small_config(layers=1), dtype=torch.float32).to(DEVICE).train()
    stack = model.encoder_wrapper
    lengths = {"text": [7, 2, 5], "image": [10, 10, 10], "audio": [9, 4, 6]}
    plan = RoutePlan.from_lengths(lengths, device=DEVICE, first_is_cls=True)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(plan.capacity, 48, generator=generator).to(DEVICE)
    bias = [torch.randn(3, 2 * offset + 4, generator=generator).to(DEVICE) for offset in plan.code_offsets]
    return stack.fusion_model.layers[0], x, plan, bias


def run(layer, x, route, bias):
    x = x.clone().requires_grad_()
    layer.zero_grad()
    out = layer(x, route, bias)
    (out * torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out).cos()).sum().backward()
    return {"out": out.detach(), "x": x.grad, **{name: p.grad.clone() for name, p in layer.named_parameters()}}


@pytest.mark.parametrize("which", [0, 1], ids=["mixed", "FFN dropped whole"])
def test_skipped_rows_keep_their_bits_and_the_rest_is_as_if_all_were_computed(which):
    layer, x, plan, bias = layer_inputs()
    keep = KEEP[which : which + 1]
    (route,) = branches(plan.with_drop_path(keep))
    whole = Branches(*(Branch(plan, None, factors.to(DEVICE), plan.sample) for factors in keep[0]))
    expected, got = run(layer, x, whole, bias), run(layer, x, route, bias)
    assert_close(got, expected, 1e-4)
    dropped = (keep[0] == 0).all(0).to(DEVICE)[plan.sample.long()]
    assert dropped.any() and torch.equal(got["out"][dropped], x[dropped])


@pytest.mark.slow
def test_a_step_with_drop_path_repeats_bit_for_bit():
    first = results("fused", **OPTIONS["drop path"])
    for _ in range(REPEATS if DEVICE == "cuda" else 3):
        again = results("fused", **OPTIONS["drop path"])
        assert all(torch.equal(again[name], value) for name, value in first.items())


def test_a_layer_compiles_in_one_graph_with_skipped_rows():
    torch._dynamo.reset()
    layer, x, plan, bias = layer_inputs()
    (route,) = branches(plan.with_drop_path(KEEP[:1]))
    expected = run(layer, x, route, bias)
    got = run(torch.compile(layer, fullgraph=True, backend="aot_eager"), x, route, bias)
    got = {name.removeprefix("_orig_mod."): value for name, value in got.items()}
    assert_close(got, expected, 1e-5)


@pytest.mark.skipif(DEVICE != "cuda", reason="graphs are CUDA's")
def test_a_captured_graph_follows_its_refilled_plan():
    def plan_of(text, image, keep):
        lengths = {"text": text, "image": image}
        widths = {"text": 9, "image": 10}
        plan = RoutePlan.from_lengths(lengths, device=DEVICE, widths=widths, capacity=64, first_is_cls=True)
        return plan.with_drop_path(keep.to(DEVICE))

    width = 48
    weights = [[torch.randn(width, device=DEVICE) for _ in range(2)] for _ in range(4)]
    x = torch.randn(64, width, device=DEVICE, requires_grad=True)

    def step(plan):
        attend = branches(plan)[0].attention
        z = layer_norm(x, weights[0], weights[1], row_index=attend.row_index, offsets=attend.plan.offsets)
        stream = residual(
            x,
            z,
            drop_path=attend.drop_path,
            sample=plan.sample,
            row_index=attend.row_index,
            offsets=attend.plan.offsets,
        )
        stream, normed = residual_layer_norm(stream, stream, weights[0][0], weights[1][0])
        n = gated_sub_ln(normed, stream, weights[2], weights[3], offsets=plan.offsets)
        (gradient,) = torch.autograd.grad(n.square().sum() + stream.sum(), [x])
        return n, gradient

    plan = plan_of([9, 3, 5], [10, 10, 10], KEEP[:1])
    replay, out = captured(lambda: step(plan))
    for text, image, keep in (([2, 9, 1], [10, 1, 4], KEEP[1:]), ([1, 1, 1], [1, 1, 1], KEEP[:1].flip(2))):
        other = plan_of(text, image, keep)
        plan.copy_(other)
        replay()
        for got, want in zip(out, step(other), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("drop_path", (False, True), ids=("every row", "drop path"))
def test_a_whole_layer_captured_forward_and_backward_follows_its_refilled_plan(drop_path):
    """Attention, both norms, the residual stream and the FFN by grouped products; on a CPU a replay calls the layer."""
    on_gpu = DEVICE == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float16
    sizes = {"embed_dim": 256, "ffn_embed_dim": 512, "attention_heads": 4} if on_gpu else {
        "embed_dim": 32, "ffn_embed_dim": 48, "attention_heads": 2}  # fmt: skip
    config = TransformerConfig(**sizes, layers=1, layer_scale=0.1, head_scale=True, audio=None)
    torch.manual_seed(0)
    layer = TransformerLayer(config).to(DEVICE, dtype).train()
    layer.packed_ffn = functools.partial(layer.packed_ffn, strategy="grouped")

    def plan_of(text, image, keep):
        lengths, widths = {"text": text, "image": image}, {"text": 9, "image": 10}
        plan = RoutePlan.from_lengths(lengths, device=DEVICE, widths=widths, capacity=64)
        return plan.with_drop_path(keep.to(DEVICE)) if drop_path else plan

    plan = plan_of([9, 3, 5], [10, 10, 10], KEEP[:1])
    x = torch.randn(64, sizes["embed_dim"], device=DEVICE, dtype=dtype).requires_grad_()
    bias = [
        torch.randn(sizes["attention_heads"], 2 * offset + 4, device=DEVICE).requires_grad_()
        for offset in plan.code_offsets
    ]
    leaves, gradient = [x, *bias, *layer.parameters()], torch.randn_like(x)

    def step(plan):
        out = layer(x, branches(plan)[0] if drop_path else plan, bias)
        return [out.detach(), *torch.autograd.grad([out], leaves, [gradient])]

    with small_tiles():
        replay, results = captured(lambda: step(plan), DEVICE)
        refills = (([2, 9, 1], [10, 1, 4], KEEP[1:]), ([1, 1, 1], [0, 1, 0], KEEP[:1].flip(2)))
        for text, image, keep in refills:
            other = plan_of(text, image, keep)
            plan.copy_(other)
            for result in results:
                result.fill_(torch.nan)
            replay()
            expected = step(other)
            assert len(expected) == len(leaves) + 1 and expected[0].isfinite().all()
            assert all(map(torch.equal, results, expected))
