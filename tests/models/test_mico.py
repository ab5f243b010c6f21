"""MiCo over packed rows: any modalities of any sample, the padded reference, its losses, state dicts."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from models._mico import CAPTIONS, CONFIG, SAMPLES, TEXT, alone, batch, frames, mico
from models._small import BACKENDS

from onepeace_fast.models.mico import Masked, mask_captions
from onepeace_fast.models.mico.losses import draw_pairs, draw_wrong


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_of_a_mixed_batch_is_what_it_is_alone_and_padded(backend):
    model, reference = mico(backend), mico("reference")
    together = model.embed(text=CAPTIONS, **batch())
    matched = model.match(CAPTIONS, **batch())
    for sample in range(4):
        own = alone(sample)
        expected = reference.embed(text=CAPTIONS[sample : sample + 1], **own)
        for name, x in expected.items():
            row = sample if name in ("text", "union") else SAMPLES[name].index(sample)
            torch.testing.assert_close(together[name][row], x[0], rtol=1e-10, atol=1e-12, msg=lambda t: f"{name}: {t}")  # noqa: B023
        probability = reference.match(CAPTIONS[sample : sample + 1], **own)
        torch.testing.assert_close(matched[sample], probability[0], rtol=1e-10, atol=1e-12)
    assert set(together) == {*SAMPLES, "text", "union"}


def test_the_order_in_which_modalities_come_does_not_matter():
    model, given = mico(), batch()
    turned = dict(reversed(given.items()))
    for name, x in model.embed(text=CAPTIONS, **given).items():
        torch.testing.assert_close(model.embed(text=CAPTIONS, **turned)[name], x, rtol=0, atol=0)


def test_texts_are_matched_with_the_samples_that_are_named():
    model = mico()
    of = [3, 0, 2, 0]
    found = model.match(CAPTIONS, of=of, **batch())
    for text, sample in enumerate(of):
        expected = model.match(CAPTIONS[text : text + 1], **alone(sample))
        torch.testing.assert_close(found[text], expected[0], rtol=1e-10, atol=1e-12)


def test_frames_of_all_modalities_go_through_the_encoder_in_one_pass_and_one_channel_is_three():
    model, given, seen = mico(), frames(), []
    model.vision_encoder.visual.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    found = model.encode(**given)
    assert seen == [(3 + 1 + 2 + 4 + 2 + 1, 5, 16)]
    assert [x.shape[0] for x in found["audio"]] == [3, 1] and [x.shape[0] for x in found["vision"]] == [2, 4]
    whole = model.encode(vision=[x[:, None].repeat(1, 3, 1, 1) for x in given["audio"]])["vision"]
    for one, other in zip(found["audio"], whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pool", [False, True])
def test_packed_rows_give_the_losses_and_gradients_of_padded_ones(pool):
    found = []
    for backend in BACKENDS:
        model = mico(backend, pool=pool)
        parts = model.losses(CAPTIONS, generator=generator(), **batch())
        found.append({**parts, **gradients(model, parts["loss"])})
    for name, value in found[0].items():
        assert value is not None, name
        torch.testing.assert_close(found[1][name], value, rtol=1e-8, atol=1e-10, msg=lambda text: f"{name}: {text}")  # noqa: B023


def naive_losses(model, masked, pairs):
    """Sample by sample, all logits at once."""
    text = torch.cat([model.embed(text=row[row != 0][None])["text"] for row in CAPTIONS])
    own = [model.embed(**alone(sample)) for sample in range(4)]
    terms = []
    for name in (*SAMPLES, "union"):
        there = [sample for sample in range(4) if name in own[sample]]
        x, t = torch.cat([own[sample][name] for sample in there]), text[there]
        target = torch.arange(len(there))
        terms += [
            F.cross_entropy(a @ b.detach().t() / model.contra_temp, target, label_smoothing=0.1)
            for a, b in ((t, x), (x, t))
        ]
    contrast = torch.stack(terms).mean()
    matching, hidden = [], []
    for caption, sample, belongs in zip(*pairs, strict=True):
        p = model.match(CAPTIONS[caption][CAPTIONS[caption] != 0][None], **alone(sample))
        matching.append(-(p if belongs else 1 - p).log())
    for sample in range(4):
        ids = masked.ids[sample : sample + 1, : int((CAPTIONS[sample] != 0).sum())]
        context = model._context(model._see(alone(sample), alone(sample).get("subtitle"), None, 1))
        x = model.multimodal_encoder(ids, context, causal=True).x[0]
        scores = model.multimodal_encoder.scores(x, packed=False)
        for place in masked.hidden[sample].nonzero().flatten().tolist():
            hidden.append(F.cross_entropy(scores[place], CAPTIONS[sample, place]))
    return contrast, torch.cat(matching).mean(), torch.stack(hidden).mean()


@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_are_those_of_naive_code_sample_by_sample(backend, monkeypatch):
    model, plain = mico(backend), mico("reference")
    see = plain._see
    monkeypatch.setattr(plain, "_see", lambda given, subtitle, *rest: see(
        {name: x for name, x in given.items() if name != "subtitle"}, subtitle, *rest))  # fmt: skip
    masked = mask_captions(CAPTIONS, TEXT, generator(4))
    parts = model.losses(CAPTIONS, masked=masked, generator=generator(), **batch())
    features = model.embed(text=CAPTIONS, **batch())
    pairs = draw_pairs(features["text"], features["union"], 1 / model.contra_temp, generator())
    contrast, matching, caption = naive_losses(plain, masked, pairs)
    for name, value in (("contrast", contrast), ("matching", matching), ("caption", caption)):
        torch.testing.assert_close(parts[name], value, rtol=1e-9, atol=1e-11, msg=lambda text: f"{name}: {text}")  # noqa: B023
    total = contrast + 0.1 * matching + caption
    torch.testing.assert_close(parts["loss"], total, rtol=1e-9, atol=1e-11)
    expected = gradients(plain, total)
    for name, value in gradients(model, parts["loss"]).items():
        want = torch.zeros_like(value) if expected[name] is None else expected[name]
        torch.testing.assert_close(value, want, rtol=1e-7, atol=1e-9, msg=lambda text: f"{name}: {text}")  # noqa: B023


def test_losses_follow_from_the_generator_alone():
    model = mico()
    first, again, other = (
        model.losses(CAPTIONS, generator=generator(seed), **batch())["loss"] for seed in (1, 1, 2)
    )  # fmt: skip
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_what_a_batch_does_not_read_gets_a_gradient_of_zeros():
    model = mico()
    found = gradients(model, model.losses(CAPTIONS[:2], generator=generator(), vision=frames()["vision"])["loss"])
    assert all(gradient is not None for gradient in found.values())
    zero = {name for name, gradient in found.items() if not gradient.any()}
    assert {"audio_frame_embedding", "contra_head_d.linear.weight", "contra_head_vas.bias",
            "vision_encoder.visual.head.weight", "subtitle_type_embeddings"} <= zero  # fmt: skip
    assert "contra_head_v.linear.weight" not in zero and "vision_encoder.visual.cls_token" not in zero
    subtitles = {"subtitle": batch()["subtitle"]}
    found = gradients(model, model.losses(CAPTIONS[:2], generator=generator(), **subtitles)["loss"])
    assert not found["vision_encoder.visual.cls_token"].any()


def test_hidden_tokens_are_three_fifths_never_the_first_and_at_least_one():
    ids = torch.randint(6, 23, (400, 12), generator=generator())
    ids[:, 9:] = 0
    ids[:50, 2:] = 0
    masked = mask_captions(ids, TEXT, generator(1))
    hidden = masked.hidden
    assert not hidden[:, 0].any() and not hidden[:, 9:].any() and hidden[:50, 1].all()
    assert hidden.any(1).all()
    share = hidden[50:, 1:9].float().mean().item()
    assert share == pytest.approx(0.6, abs=0.03)
    assert torch.equal(masked.ids[~hidden], ids[~hidden])
    put = masked.ids[hidden] == 4
    same = masked.ids[hidden] == ids[hidden]
    assert put.float().mean().item() == pytest.approx(0.8, abs=0.03)
    # Of the tenth that is replaced by any of 17 words one in 17 stays by chance.
    assert same.float().mean().item() == pytest.approx(0.1 + 0.1 / 17, abs=0.02)
    again = mask_captions(ids, TEXT, generator(1))
    assert torch.equal(again.ids, masked.ids) and torch.equal(again.hidden, hidden)


@pytest.mark.parametrize("block", [12, 1 << 22])
def test_wrong_partners_are_drawn_by_their_similarity_and_never_the_own(block, monkeypatch):
    monkeypatch.setattr("onepeace_fast.models.losses.BLOCK_LOGITS", block)
    x = F.normalize(torch.randn(5, 3, generator=generator(), dtype=torch.float64), dim=1)
    y = F.normalize(torch.randn(5, 3, generator=generator(1), dtype=torch.float64), dim=1)
    scale, draws, drawn = torch.tensor(2.0, dtype=torch.float64), 1000, torch.zeros(5, 5)
    source = generator(2)
    for _ in range(draws):
        drawn[torch.arange(5), draw_wrong(x, y, scale, source)] += 1
    weights = (scale * x @ y.t()).softmax(1) + 1e-4
    weights.fill_diagonal_(0)
    expected = weights / weights.sum(1, keepdim=True)
    torch.testing.assert_close(drawn / draws, expected.float(), rtol=0, atol=0.06)
    assert not drawn.diagonal().any()


def test_the_loss_is_no_view_of_which_fsdp2_would_warn():
    found = mico().losses(CAPTIONS, generator=generator(), **batch())
    assert found["loss"].requires_grad and found["loss"]._base is None


def test_features_that_are_no_numbers_draw_any_other_row():
    x = torch.ones(3, 2)
    x[1] = torch.nan
    try:
        drawn = [draw_wrong(x, x, scale, generator()) for scale in (torch.tensor(1.0), torch.tensor(torch.inf))]
    except RuntimeError:
        drawn = []
    assert len(drawn) == 2 and all(other != own for others in drawn for own, other in enumerate(others))


def test_the_union_is_upstream_s_head_of_just_these_modalities_or_the_sum_of_their_heads():
    model = mico()
    pools = {name: torch.randn(2, 16, dtype=torch.float64) for name in ("audio", "normal", "vision")}
    own = {name: model.contra_head_normal if name == "normal" else getattr(model, f"contra_head_{name[0]}")
           for name in pools}  # fmt: skip
    joined = sum(own[name](x) for name, x in pools.items())
    torch.testing.assert_close(model.union_feature(pools), F.normalize(joined, dim=1))
    two = {name: pools[name] for name in ("audio", "vision")}
    joined = model.contra_head_va(torch.cat([two["vision"], two["audio"]], 1))
    torch.testing.assert_close(model.union_feature(two), F.normalize(joined, dim=1))
    one = {"audio": pools["audio"]}
    torch.testing.assert_close(model.union_feature(one), model.feature("audio", pools["audio"]))


def test_pairs_are_the_own_ones_and_two_wrong_ones_of_each_sample():
    x, y = (F.normalize(torch.randn(5, 3, generator=generator(seed)), dim=1) for seed in (0, 1))
    pairs = draw_pairs(x, y, torch.tensor(2.0), generator())
    found = [*zip(*pairs, strict=True)]
    assert len(found) == 15 and pairs.samples == sorted(pairs.samples)
    assert [(t, s) for t, s, belongs in found if belongs] == [(i, i) for i in range(5)]
    wrong = [(t, s) for t, s, belongs in found if not belongs]
    assert all(t != s for t, s in wrong)
    assert all(sum(s == one for _, s in wrong) >= 1 and sum(t == one for t, _ in wrong) >= 1 for one in range(5))


def test_state_dicts_go_both_ways_under_upstream_s_names():
    model, other = mico(), mico("reference")
    state = model.to_upstream_state_dict()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_upstream_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    names = {
        "vision_encoder.visual.blocks.1.attn.qkv.weight", "vision_encoder.logit_scale", "itm_head.layernorm.bias",
        "multimodal_encoder.bert.encoder.layer.0.crossattention.self.query.weight", "contra_head_vas.weight",
        "multimodal_encoder.cls.predictions.decoder.weight", "hidden_trans_subtitle_multimodal.1.weight",
    }  # fmt: skip
    assert names <= set(state)
    assert set(state) - set(other.state_dict()) == {
        f"multimodal_encoder.cls.predictions.decoder.{part}" for part in ("weight", "bias")
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_rounds_and_changes_little(backend):
    model = mico(backend, torch.float32)
    exact = model.embed(text=CAPTIONS, **batch(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.embed(text=CAPTIONS, **batch(torch.float32))
        loss = model.losses(CAPTIONS, generator=generator(), **batch(torch.float32))["loss"]
    for name, x in exact.items():
        assert 1e-5 < (rounded[name].float() - x).abs().max().item() < 0.05, name
    assert loss.dtype == torch.float32
    assert all(gradient.isfinite().all() for gradient in gradients(model, loss).values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_hooks_on_parts_are_called(backend):
    model, called = mico(backend), []
    for name, module in model.named_modules():
        if name:
            module.register_forward_hook(lambda *given, name=name: called.append(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        model.losses(CAPTIONS, generator=generator(), **batch())
    # Lists and dictionaries are no calls, words are read by their matrix, and no sample has just these sets.
    containers = ("blocks", "layer", "cls", "predictions", "vision_encoder")
    silent = {name for name, _ in model.named_modules() if name} - {*called}
    assert {name for name in silent if not name.endswith(containers) and "embeddings." not in name} == {
        "vision_encoder.visual.head", "contra_head_va", "contra_head_vs"
    }  # fmt: skip


def test_tasks_are_called_by_name():
    model, masked = mico(), Masked(CAPTIONS, torch.zeros_like(CAPTIONS, dtype=torch.bool))
    assert model.backend == "fused" and model.config is not CONFIG
    torch.testing.assert_close(model("match", text=CAPTIONS, **batch()), model.match(CAPTIONS, **batch()))
    assert masked.hidden.sum() == 0
