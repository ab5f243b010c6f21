"""Dropout, attention's dropout and DropPath of UnIVAL in training: their shares, their places, their gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from models._small import BACKENDS
from models._unival import SAMPLES, SOURCE, TARGET, maps, refusal, unival, unival_config

from onepeace_fast.models.unival import UnivalConfig
from onepeace_fast.models.unival.layers import PaddedRoute, add_and_norm
from onepeace_fast.models.unival.noise import draw
from onepeace_fast.ops import residual

RATES = {
    "dropout": 0.3, "attention_dropout": 0.25, "activation_dropout": 0.2, "encoder_drop_path_rate": 0.4,
    "decoder_drop_path_rate": 0.4,
}  # fmt: skip
CODE = [False, True, False, True]
BRANCHES = {
    "encoder": [("attn_ln", "final_layer_norm"), ("fc2", None)],
    "decoder": [("self_attn_ln", "encoder_attn_layer_norm"), ("cross_attn_ln", "final_layer_norm"), ("fc2", None)],
}


def loss_of(model):
    return model.loss(SOURCE, TARGET, code=CODE, samples=SAMPLES, **maps())


def count_of(share, p, count):
    """Whether a share of so many draws is that of a probability, to 5 deviations."""
    return abs(share - p) < 5 * math.sqrt(p * (1 - p) / count)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_branch_of_each_layer_is_dropped_by_element_and_by_sample(backend):
    model = unival(backend, dropout=0.3, encoder_drop_path_rate=0.4, decoder_drop_path_rate=0.4, embed_dim=64).train()
    stack_layers = {name: [*model.get_submodule(name).layers] for name in BRANCHES}
    seen = {}
    for stack, layers in stack_layers.items():
        for i, layer in enumerate(layers):
            for name, part in layer.named_children():
                part.register_forward_hook(
                    lambda part, given, y, key=(stack, i, name): seen.update({key: (given[0].detach(), y.detach())})
                )
            layer.register_forward_hook(
                lambda part, given, y, key=(stack, i, None): seen.update({key: (given[0].detach(), y.detach())})
            )
    torch.manual_seed(0)
    kept, whole = {}, {}
    for _ in range(30):
        loss_of(model)
        for stack, places in BRANCHES.items():
            for i in range(2):
                before = seen[stack, i, None][0]
                for branch, (part, following) in enumerate(places):
                    y = seen[stack, i, part][1]
                    after = seen[stack, i, following][0] if following else seen[stack, i, None][1]
                    factor = (after - before) / y
                    before = after
                    rate = 0.4 * i
                    live = factor.abs() > 1e-9
                    expected = torch.full_like(factor[live], 1 / (0.7 * (1 - rate)))
                    torch.testing.assert_close(factor[live], expected, rtol=1e-5, atol=0)
                    rows = factor.flatten(0, -2)
                    found = live.flatten(0, -2).any(1)
                    key = (stack, i, branch)
                    counts = kept.setdefault(key, [0, 0])
                    counts[0] += int((rows[found].abs() > 1e-9).sum())
                    counts[1] += rows[found].numel()
                    if backend == "reference":
                        by_sample = live.flatten(1).any(1)
                        assert torch.equal(by_sample[:, None].expand(live.shape[:2]), live.any(2))
                        whole.setdefault(key, []).append(by_sample.tolist())
    for key, (live, count) in kept.items():
        assert count_of(live / count, 0.7, count), key
    for (stack, i, branch), draws in whole.items():
        flat = [value for own in draws for value in own]
        assert i == 1 or all(flat)
        assert i == 0 or count_of(sum(flat) / len(flat), 0.6, len(flat)), (stack, branch)
        others = [own for key, own in whole.items() if key[1] == i == 1 and key != (stack, i, branch)]
        assert all(own != draws for own in others)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_s_factor_is_that_of_all_its_tokens(backend):
    model = unival(backend, encoder_drop_path_rate=0.7).train()
    seen = []
    model.encoder.layers[1].register_forward_pre_hook(lambda part, given: seen.append(given[2]))
    model.encoder.layers[1].register_forward_hook(lambda part, given, y: seen.append(y - given[0]))
    torch.manual_seed(3)
    loss_of(model)
    noise, change = seen
    assert noise.drop_path.shape == (2, 4) and len({tuple(row) for row in noise.drop_path.tolist()}) == 2
    none = [s for s in range(4) if not noise.drop_path[:, s].any()]
    tokens = change.flatten(1).any(1) if backend == "reference" else change.any(1)
    if backend == "fused":
        assert torch.equal(~tokens, torch.isin(noise.sample.long(), torch.tensor(none)))
    else:
        assert [s for s in range(4) if not tokens[s]] == none
    assert none


@pytest.mark.parametrize("backend", BACKENDS)
def test_embedded_tokens_are_dropped_behind_their_norm(backend):
    model = unival(backend, dropout=0.3, embed_dim=64).train()
    norms, first = {"encoder": [], "decoder": []}, {}
    for stack, made in norms.items():
        part = model.get_submodule(stack)
        for name in ("layernorm_embedding", "patch_layernorm_embedding", "code_layernorm_embedding"):
            if name in part._modules:
                part.get_submodule(name).register_forward_hook(lambda norm, given, y, made=made: made.append(y))
        part.layers[0].register_forward_pre_hook(lambda layer, given, stack=stack: first.update({stack: given[0]}))
    torch.manual_seed(0)
    for _ in range(4):
        for made in norms.values():
            made.clear()
        loss_of(model)
        for stack, made in norms.items():
            x = first[stack]
            if backend == "reference":
                continue
            whole = torch.cat(made)
            live = x != 0
            torch.testing.assert_close(x[live], whole[live] / 0.7, rtol=1e-12, atol=0)
            assert count_of(live.double().mean().item(), 0.7, live.numel())
    if backend == "reference":
        x, layout = first["encoder"], SOURCE != 1
        text = x[:, -SOURCE.shape[1] :][layout]
        assert count_of((text != 0).double().mean().item(), 0.7, text.numel())
    model.eval()
    for made in norms.values():
        made.clear()
    loss_of(model)
    if backend == "fused":
        assert torch.equal(first["encoder"], torch.cat(norms["encoder"]))


def test_attention_s_probabilities_are_dropped_before_the_head_scale():
    torch.manual_seed(0)
    heads, length, dim = 2, 60, 60
    q, k = torch.randn(2, 3, length, heads * 4, dtype=torch.float64)
    v = torch.eye(length, dtype=torch.float64).repeat(3, 1, heads)[:, :, : heads * dim]
    bias = torch.randn(3, heads, length, length, dtype=torch.float64)
    scale = torch.tensor([0.5, 2.0], dtype=torch.float64)
    whole = PaddedRoute(bias).attend(q, k, v, scale)
    dropped = PaddedRoute(bias, 0.25).attend(q, k, v, scale)
    live = dropped != 0
    torch.testing.assert_close(dropped[live], whole[live] / 0.75, rtol=1e-9, atol=1e-15)
    assert count_of(live.double().mean().item(), 0.75, live.numel())


@pytest.mark.parametrize(("stack", "count"), [("encoder", 2), ("decoder", 4)])
def test_attention_s_dropout_reaches_every_attention_and_none_in_evaluation(stack, count, monkeypatch):
    seen = []
    original = PaddedRoute.attend
    monkeypatch.setattr(
        PaddedRoute, "attend", lambda route, *given: seen.append(route.dropout) or original(route, *given)
    )
    model = unival("reference", attention_dropout=0.25).train()
    model.get_submodule({"encoder": "decoder", "decoder": "encoder"}[stack]).eval()
    model.loss(SOURCE, TARGET)
    assert seen.count(0.25) == count and seen.count(0.0) == 6 - count
    seen.clear()
    model.eval().loss(SOURCE, TARGET)
    assert set(seen) == {0.0}


@pytest.mark.parametrize("backend", BACKENDS)
def test_behind_gelu_a_share_is_dropped_before_the_norm(backend):
    model = unival(backend, activation_dropout=0.2, ffn_dim=96).train()
    layer, seen = model.decoder.layers[1], {}
    layer.fc1.register_forward_hook(lambda part, given, y: seen.update(u=y))
    layer.ffn_layernorm.register_forward_pre_hook(lambda part, given: seen.update(h=given[0]))
    torch.manual_seed(1)
    model.loss(SOURCE, TARGET)
    live = seen["h"] != 0
    torch.testing.assert_close(seen["h"][live], F.gelu(seen["u"])[live] / 0.8, rtol=1e-12, atol=0)
    assert count_of(live.double().mean().item(), 0.8, live.numel())


@pytest.mark.parametrize("changed", [*({name: rate} for name, rate in RATES.items()), RATES])
def test_gradients_under_noise_are_those_of_the_pass_that_was_drawn(changed):
    backends = ["reference"] if "attention_dropout" in changed else BACKENDS
    for backend in backends:
        model = unival(backend, **changed)
        whole = loss_of(model)
        model.train()

        def drawn(model=model):
            torch.manual_seed(4)
            return loss_of(model)

        loss = drawn()
        assert abs(loss - whole) > 1e-6 and torch.equal(drawn(), loss)
        loss.backward()
        generator = torch.Generator().manual_seed(1)
        parameters = [p for p in model.parameters() if p.grad is not None]
        direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
        slope = sum((p.grad * d).sum() for p, d in zip(parameters, direction, strict=True)).item()
        found = []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p += step * d
                found.append(drawn().item())
        assert (found[0] - found[1]) / 2e-6 == pytest.approx(slope, rel=1e-5)


def test_ops_add_the_noise_that_modules_do():
    torch.manual_seed(0)
    x, y = torch.randn(2, 9, 16, dtype=torch.float64)
    norms = [torch.nn.LayerNorm(16, dtype=torch.float64) for _ in range(2)]
    (noise,) = draw(0.0, 0.0, 0.0, 1, 2, 3, torch.tensor([0, 1, 2] * 3, dtype=torch.int32), x.device)
    assert noise.of_op(1) == {} and torch.equal(noise.on(y, 0), y)
    factors = torch.tensor([[0.0, 2.0, 1.5], [1.0, 0.0, 3.0]])
    noise = noise._replace(drop_path=factors)
    for branch in range(2):
        modules = add_and_norm(x, y, *norms, noise, branch)
        with torch.autocast("cpu", torch.bfloat16):
            ops = add_and_norm(x, y, *norms, noise, branch)
        for one, other in zip(modules, ops, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
        expected = x + factors[branch].repeat(3)[:, None].double() * norms[0](y)
        torch.testing.assert_close(modules[0], expected, rtol=1e-12, atol=1e-12)
    (noise,) = draw(0.3, 0.0, 0.0, 1, 2, 3, noise.sample, x.device)
    many = torch.ones(400, 64, dtype=torch.float64)
    for branch in range(2):
        found = residual(many, many, None, **noise.of_op(branch)) - 1
        live = found != 0
        assert count_of(live.double().mean().item(), 0.7, live.numel())
        torch.testing.assert_close(found[live], torch.full_like(found[live], 1 / 0.7), rtol=1e-6, atol=0)
    assert noise.seeds[0] != noise.seeds[1]


def test_the_ops_of_a_model_under_autocast_drop_by_element_and_by_sample():
    model = unival("fused", torch.float32, dropout=0.3, encoder_drop_path_rate=0.4, decoder_drop_path_rate=0.4).train()
    losses = set()
    with torch.autocast("cpu", torch.bfloat16):
        for seed in (0, 1, 0):
            torch.manual_seed(seed)
            losses.add(model.loss(SOURCE, TARGET).item())
        assert len(losses) == 2
        model.loss(SOURCE, TARGET).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_without_rates_and_in_evaluation_there_is_no_noise():
    quiet, noisy = unival().train(), unival(None, **RATES)
    assert torch.equal(loss_of(quiet), loss_of(quiet.eval()))
    assert torch.equal(loss_of(noisy), loss_of(noisy))
    assert noisy.generate(SOURCE, beams=2, max_length=3) == quiet.generate(SOURCE, beams=2, max_length=3)
    assert quiet.train().generate(SOURCE, beams=2, max_length=3)
    says = "model: expected evaluation mode, got training mode with noise; call its eval()"
    assert refusal(lambda: noisy.train().generate(SOURCE)) == says


def test_the_fused_backend_does_not_train_with_attention_s_dropout():
    model = unival("fused", attention_dropout=0.1)
    assert loss_of(model).isfinite()
    says = "backend: expected None or 'reference' to train with attention_dropout, got 'fused'"
    assert refusal(lambda: loss_of(model.train())) == says
    model.backend = None
    assert loss_of(model).isfinite()


def test_rates_are_upstream_s_arguments_and_probabilities():
    from onepeace_fast.models.unival.config import _FIXED

    config = UnivalConfig.from_upstream({**_FIXED, **RATES}, 9)
    assert {name: getattr(config, name) for name in RATES} == RATES
    assert UnivalConfig.from_upstream(config.to_upstream(), 9) == config
    assert UnivalConfig.from_upstream({**_FIXED, "relu_dropout": 0.1}, 9).activation_dropout == 0.1
    assert (
        UnivalConfig.from_upstream({**_FIXED, "relu_dropout": 0.1, "activation_dropout": 0.2}, 9).activation_dropout
        == 0.2
    )
    unset = dict.fromkeys(
        ("attention_dropout", "with_cls", "hop_size", "video_encoder_name", "layernorm_image_embedding")
    )
    assert UnivalConfig.from_upstream({**_FIXED, **unset}, 9) == UnivalConfig.from_upstream(_FIXED, 9)
    for value in (1, -0.1, True, "0.1"):
        says = f"dropout: expected a probability in [0, 1), got {value!r}"
        assert refusal(lambda: unival_config(dropout=value)) == says  # noqa: B023
