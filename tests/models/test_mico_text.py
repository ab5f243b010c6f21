"""The text encoder against Hugging Face's BERT, and packed texts against padded ones."""

import pytest
import torch
from models._mico import CONTEXT_WIDTH, bert, context_of, naive_bert, text_encoder
from models._small import BACKENDS

from onepeace_fast.models.mico import TextEncoder

TEXTS = torch.tensor([[5, 9, 7, 3, 0], [6, 8, 0, 0, 0], [5, 4, 2, 9, 11], [3, 0, 0, 0, 0]])
LENGTHS = {"vision": [3, 5], "audio": [2, 4], "subtitle": [1]}
SAMPLES = {"vision": [0, 3], "audio": [1, 3], "subtitle": [2]}
PLACES = [[0, 1, 2], [8, 9], [14], [*range(3, 8), *range(10, 14)]]  # of each sample in the packed rows
KINDS = ["alone", "context", "causal", "causal-context"]
CASES = [(False, False), (False, True), (True, False), (True, True)]


def weights_of(x, seed=1):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)


@pytest.mark.parametrize(("causal", "sees"), CASES, ids=KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients_are_those_of_naive_code_text_by_text(backend, causal, sees):
    model, context = text_encoder(backend), context_of(LENGTHS, SAMPLES) if sees else None
    found = model(TEXTS, context, causal=causal)
    x = found.texts.unpacked(found.x)
    rows = context.x.detach().clone().requires_grad_() if sees else None
    leaves = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    total = 0.0
    for text, places in enumerate(PLACES):
        ids = TEXTS[text][TEXTS[text] != 0]
        expected = naive_bert(leaves, ids, rows[places] if sees else None, causal)
        torch.testing.assert_close(x[text, : len(ids)], expected, rtol=1e-10, atol=1e-12)
        total = total + (expected * weights_of(x)[text, : len(ids)]).sum()
    assert not x[TEXTS == 0].any()
    (x * weights_of(x)).sum().backward()
    total.backward()
    for name, parameter in model.named_parameters():
        want = leaves[name].grad
        if want is not None:
            torch.testing.assert_close(parameter.grad, want, rtol=1e-9, atol=1e-11, msg=lambda t: f"{name}: {t}")  # noqa: B023
    if sees:
        torch.testing.assert_close(context.x.grad, rows.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize(("causal", "sees"), CASES, ids=KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_gradients_are_those_of_hugging_face_s_bert(backend, causal, sees):
    pytest.importorskip("transformers")
    model, other = text_encoder(backend), bert()
    model.load_upstream_state_dict(other.state_dict())
    context = context_of(LENGTHS, SAMPLES) if sees else None
    found = model(TEXTS, context, causal=causal)
    x, valid = found.texts.unpacked(found.x), TEXTS != 0
    weights = weights_of(x)
    logits = model.scores(found.texts.tokens(found.x, valid), found.texts.packed)
    (x * weights).sum().add((logits * weights_of(logits, 2)).sum()).backward()

    length = TEXTS.shape[1]
    seen = valid[:, None, None].expand(-1, 1, length, -1)
    seen = seen & torch.ones(length, length, dtype=torch.bool).tril() if causal else seen
    given, rows = {}, None
    if sees:
        rows = context.x.detach().clone().requires_grad_()
        index = torch.tensor([[*own, *[0] * (9 - len(own))] for own in PLACES])
        there = torch.arange(9) < torch.tensor([[len(own)] for own in PLACES])
        given = {"encoder_hidden_states": rows[index], "encoder_attention_mask": there.long()}
    hidden = (1.0 - seen.double()) * torch.finfo(torch.float64).min
    expected = other.bert(TEXTS, attention_mask=hidden, use_cache=False, **given).last_hidden_state
    plain = expected.masked_fill(~valid[:, :, None], 0)
    torch.testing.assert_close(x, plain, rtol=1e-10, atol=1e-12)
    scores = other.cls(expected[valid])
    torch.testing.assert_close(logits, scores, rtol=1e-10, atol=1e-12)
    (plain * weights).sum().add((scores * weights_of(logits, 2)).sum()).backward()
    own = model.to_upstream_state_dict(grads=True)
    for name, parameter in other.named_parameters():
        if parameter.grad is None:
            assert own[name] is None, name
        else:
            torch.testing.assert_close(own[name], parameter.grad, rtol=1e-9, atol=1e-11, msg=lambda t: f"{name}: {t}")  # noqa: B023
    if sees:
        torch.testing.assert_close(context.x.grad, rows.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_state_dicts_of_hugging_face_go_both_ways():
    pytest.importorskip("transformers")
    model, other = text_encoder(), bert()
    state = {**other.state_dict(), "bert.embeddings.position_ids": torch.arange(9)[None]}
    model.load_upstream_state_dict(state)
    found = model.to_upstream_state_dict()
    assert set(found) == set(other.state_dict())
    assert all(torch.equal(found[name], value) for name, value in other.state_dict().items())
    again = bert(seed=5)
    again.load_state_dict(found)
    assert torch.equal(again.bert.embeddings.word_embeddings.weight, other.bert.embeddings.word_embeddings.weight)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cls.predictions.decoder.weight", "cls.predictions.decoder.weight differs from the one that follows"),
        ("cls.predictions.decoder.bias", "cls.predictions.decoder.bias differs from the one that follows"),
        ("bert.embeddings.position_ids", "bert.embeddings.position_ids differs from the one that follows"),
        ("bert.pooler.dense.bias", "unexpected: bert.pooler.dense.bias"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused(name, says):
    model = text_encoder()
    line = ""
    try:
        model.load_upstream_state_dict({**model.to_upstream_state_dict(), name: torch.ones(7)})
    except ValueError as error:
        line = str(error)
    assert line.startswith("state_dict: expected ") and says in line and "\n" not in line


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_several_texts_see_one_sample_and_some_samples_no_text_sees(backend, causal):
    model, context = text_encoder(backend), context_of(LENGTHS, SAMPLES)
    samples = [0, 3, 3, 3]
    read = model(TEXTS, context, samples=samples, causal=causal)
    together = read.texts.unpacked(read.x)
    reference = text_encoder("reference")
    for text, sample in enumerate(samples):
        alone = context_of(LENGTHS, SAMPLES, only=sample)
        length = int((TEXTS[text] != 0).sum())
        expected = reference(TEXTS[text : text + 1, :length], alone, causal=causal).x
        torch.testing.assert_close(together[text : text + 1, :length], expected, rtol=1e-10, atol=1e-12)


def test_no_padding_is_computed_and_a_context_s_keys_once():
    model, context, rows = text_encoder("fused"), context_of(LENGTHS, SAMPLES), set()
    for name, module in model.named_modules():
        if name.endswith((".key", "intermediate.dense")):
            module.register_forward_hook(lambda module, given, output, name=name: rows.add((name, len(output))))
    model(TEXTS, context, samples=[1, 1, 2, 3])
    assert {count for name, count in rows if "cross" not in name} == {int((TEXTS != 0).sum())}
    assert {count for name, count in rows if "crossattention.self.key" in name} == {context.x.shape[0]}


def test_what_a_text_is_padded_to_does_not_matter():
    model = text_encoder("fused")
    wide = torch.nn.functional.pad(TEXTS, (0, 3))
    torch.testing.assert_close(model(wide).first, model(TEXTS).first, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("ids", "samples", "says"),
    [
        (torch.full((2, 10), 5), None, "text: expected 1 to 9 tokens, one for a position, got 10"),
        (torch.full((2, 3), 31), None, "text: expected ids from 0 to 22, got others"),
        (torch.tensor([[5, 0, 4]]), None, "text: expected texts with their padding, 0, behind them, got one that "),
        (torch.tensor([[0, 4]]), None, "text: expected texts with their padding, 0, behind them, got one that "),
        (torch.zeros(2, 3), None, "text: expected int32 or int64 [texts, length], got float32"),
        (TEXTS[:2], [1, 0], "samples: expected 2 in ascending order below 4, got [1, 0]"),
        (TEXTS[:2], [3, 4], "samples: expected 2 in ascending order below 4, got [3, 4]"),
        (TEXTS[:2], [3], "samples: expected 2 in ascending order below 4, got [3]"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(ids, samples, says):
    line = ""
    try:
        text_encoder()(ids, context_of(LENGTHS, SAMPLES), samples=samples)
    except ValueError as error:
        line = str(error)
    assert line.startswith(says) and "\n" not in line


def test_autocast_rounds_and_changes_little():
    model, context = text_encoder("fused", torch.float32), context_of(LENGTHS, SAMPLES, dtype=torch.float32)
    exact = model(TEXTS, context).first
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(TEXTS, context).first
    assert rounded.dtype == torch.float32
    assert 1e-5 < ((rounded - exact).abs().max() / exact.abs().max()).item() < 0.03


def test_parameters_start_as_bert_s():
    torch.manual_seed(0)
    model = TextEncoder(text_encoder().config)
    assert not model.bert.embeddings.word_embeddings.weight[0].any()
    assert model.bert.encoder.layer[0].intermediate.dense.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.config.width == CONTEXT_WIDTH
