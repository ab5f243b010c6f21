"""The attention function and what it is given by models, without transformers: ``tests/layers`` has its models."""

import gc
import re
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from layers import _formulas as formulas
from support.synchronization import DEVICE, no_synchronization

from onepeace_fast import RelativeBias, dense_bias, register_attention, transformers_attention
from onepeace_fast.transformers_attention import attention_of_module, padding_mask, require_version

HEADS, SIZE = 2, 8
LENGTHS = torch.tensor([5, 9, 7])
PADDING = torch.arange(9) < LENGTHS[:, None]
MASKS = {"none": None, "right": PADDING, "left": PADDING.flip(1), "no": torch.ones_like(PADDING)}


class Attention(torch.nn.Module):
    """What the function asks of a model's attention module."""

    def __init__(self, kind="t5", bias=None, **fields):
        super().__init__()
        self.config = SimpleNamespace(model_type=kind, **fields)
        if bias is not None:
            self.relative_position_bias = Windows(bias)


class Windows(torch.nn.Module):
    """Swin's own bias of all pairs."""

    def __init__(self, bias):
        super().__init__()
        self.bias, self.window_size = bias, bias.window

    def forward(self):
        return self.bias.dense()[None]


def heads(batch, length, **options):
    """As models make them: [batch, length, heads, size], transposed."""
    options = {"dtype": torch.float64, "requires_grad": True, **options}
    return [torch.randn(batch, length, HEADS, SIZE, **options).transpose(1, 2) for _ in range(3)]


def new_bias(make=lambda: RelativeBias.t5(HEADS, 8, 10)):
    bias = make().double()
    torch.nn.init.normal_(bias.table)
    return bias


def expected(q, k, v, bias, scale):
    """[batch, length, heads, size] by the formula; a bias for each sample, or one for all."""
    samples = [
        formulas.attention(*(x.transpose(0, 1) for x in qkv), bias[min(i, len(bias) - 1)], scale)
        for i, qkv in enumerate(zip(q, k, v, strict=True))
    ]
    return torch.stack(samples)


def assert_same(got, want, leaves):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(want)
    gradients = (torch.autograd.grad((x * weight).sum(), leaves) for x in (got, want))
    for gradient, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scale", [1.0, None])
@pytest.mark.parametrize(
    "mask", [None, PADDING, torch.ones_like(PADDING), PADDING.flip(1)], ids=["none", "right", "full", "left"]
)
def test_a_series_with_padding_is_attention_over_its_tokens(mask, scale):
    bias, qkv = new_bias(), heads(3, 9)
    got, nothing = attention_of_module(Attention(), *qkv, mask, scaling=scale, position_bias=bias.dense(9)[None])
    real = torch.ones_like(PADDING) if mask is None else mask
    dense = bias.dense(9).masked_fill(~real[:, None, None], -torch.inf)
    want = expected(*qkv, dense, SIZE**-0.5 if scale is None else scale) * real[:, :, None, None]
    assert nothing is None and not got[~real].any()
    assert_same(got, want, [*qkv, bias.table])


def test_without_a_bias_tokens_attend_alike():
    qkv = heads(3, 9)
    want = expected(*qkv, torch.zeros(1, HEADS, 9, 9), SIZE**-0.5)
    assert_same(attention_of_module(Attention(), *qkv, None)[0], want, qkv)
    beit = Attention("beit", image_size=12, patch_size=4)
    qkv = heads(2, 10)
    assert_same(
        attention_of_module(beit, *qkv, None)[0], expected(*qkv, torch.zeros(1, HEADS, 10, 10), SIZE**-0.5), qkv
    )


@pytest.mark.parametrize("images, patches, window", [(12, 4, (3, 3)), ((8, 12), (4, 4), (2, 3)), ([8, 12], 4, (4, 4))])
def test_a_bias_of_images_is_that_of_the_configured_window_or_of_a_square(images, patches, window):
    bias = new_bias(lambda: RelativeBias.beit(window, HEADS))
    qkv = heads(2, bias.codes().shape[0])
    module = Attention("beit", image_size=images, patch_size=patches)
    assert transformers_attention._beit_window(module.config, qkv[0].shape[2]) == window
    got, _ = attention_of_module(module, *qkv, bias.dense()[None])
    assert_same(got, expected(*qkv, bias.dense()[None], SIZE**-0.5), [*qkv, bias.table])


def swin_mask(size, window, shift, images):
    """0 or -100 of every pair of each window, [windows, tokens, tokens]."""
    pairs = formulas.shifted_window_pairs(size, window, shift)
    counts = [n // w for n, w in zip(size, window, strict=True)]
    tokens = torch.arange(size[0] * size[1]).view(size).roll([-s for s in shift], (0, 1))
    tokens = tokens.view(counts[0], window[0], counts[1], window[1]).transpose(1, 2).flatten(0, 1).flatten(1)
    return torch.stack([~pairs[row][:, row] for row in tokens]).repeat(images, 1, 1) * -100.0


@pytest.mark.parametrize("size, shift", [((4, 6), (1, 1)), ((4, 6), (0, 0)), ((6, 9), (1, 2)), ((2, 3), (1, 1))])
@pytest.mark.parametrize("images", [1, 2])
def test_shifted_windows_attend_within_their_parts(size, shift, images):
    bias = new_bias(lambda: RelativeBias.swin((2, 3), HEADS))
    module, mask = Attention("swin", bias), swin_mask(size, (2, 3), shift, images)
    dense = bias.dense() + mask[:, None]
    qkv = heads(len(mask), 6)
    got, _ = attention_of_module(module, *qkv, dense)
    want = expected(*qkv, bias.dense().masked_fill(mask[:, None] != 0, -torch.inf), SIZE**-0.5)
    assert_same(got, want, [*qkv, bias.table])


def test_windows_without_a_shift_hand_over_their_bias_alone():
    bias, qkv = new_bias(lambda: RelativeBias.swin((2, 3), HEADS)), heads(4, 6)
    got, _ = attention_of_module(Attention("swin", bias), *qkv, bias.dense()[None])
    assert_same(got, expected(*qkv, bias.dense()[None], SIZE**-0.5), [*qkv, bias.table])


def test_half_precision_is_computed_in_single():
    bias, qkv = new_bias().bfloat16(), heads(3, 9, dtype=torch.bfloat16)
    got, _ = attention_of_module(Attention(), *qkv, PADDING, scaling=1.0, position_bias=bias.dense(9)[None])
    dense = bias.dense(9).double().masked_fill(~PADDING[:, None, None], -torch.inf)
    want = expected(*(x.double() for x in qkv), dense, 1.0) * PADDING[:, :, None, None]
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=1e-2, atol=1e-2)


def test_layers_share_the_plan_of_their_mask_and_the_vector_of_their_bias(monkeypatch):
    counts = {"from_masks": 0, "dense_vector": 0, "is_relative": 0}

    def count(owner, name):
        function = getattr(owner, name)

        def counted(*arguments):
            counts[name] += 1
            return function(*arguments)

        monkeypatch.setattr(owner, name, counted)

    count(transformers_attention.RoutePlan, "from_masks")
    count(transformers_attention, "dense_vector"), count(transformers_attention, "is_relative")
    bias = new_bias()

    def kept():
        gc.collect()
        return len(transformers_attention._PLANS), len(transformers_attention._VECTORS)

    before = kept()

    def run(layers=3):
        mask, dense = PADDING.clone(), bias.dense(9)[None]
        for _ in range(layers):
            attention_of_module(Attention(), *heads(3, 9), mask, position_bias=dense)

    run()
    assert counts == dict.fromkeys(counts, 1)
    run()
    assert counts == dict.fromkeys(counts, 2)
    assert kept() == before


def test_a_bias_that_comes_without_gradients_and_then_with_them_gets_them():
    bias, qkv = new_bias(), heads(3, 9)
    dense = bias.dense(9)[None]
    with torch.no_grad():
        attention_of_module(Attention(), *qkv, None, position_bias=dense)
    out, _ = attention_of_module(Attention(), *qkv, None, position_bias=dense)
    (gradient,) = torch.autograd.grad(out.square().sum(), bias.table, allow_unused=True)
    assert gradient is not None and gradient.any()


def test_a_bias_that_is_a_leaf_is_not_kept_alive():
    dense = torch.zeros(1, HEADS, 9, 9, dtype=torch.float64, requires_grad=True)
    attention_of_module(Attention(), *heads(3, 9), None, position_bias=dense)
    kept = weakref.ref(dense)
    del dense
    gc.collect()
    assert kept() is None


def test_nothing_waits_for_the_device_but_the_lengths_of_a_padded_batch_once(monkeypatch):
    caches = (dense_bias._standing_pairs, full_segments := transformers_attention.full_segments)
    assert full_segments is dense_bias.full_segments
    [cache.__wrapped__.cache_clear() for cache in caches]
    reads = []
    monkeypatch.setattr("onepeace_fast.routing.read_values", lambda tensor: reads.append(tensor) or [5, 9, 7])
    options = {"device": DEVICE, "dtype": torch.float32}
    windows = RelativeBias.swin((2, 3), HEADS)
    with no_synchronization():
        bias, mask = torch.randn(1, HEADS, 9, 9, **options, requires_grad=True), PADDING.to(DEVICE)
        bias = bias * 1
        for given in (mask, None, mask, mask):
            attention_of_module(Attention(), *heads(3, 9, **options), given, position_bias=bias)[0].sum().backward(
                retain_graph=True
            )
        assert len(reads) == 1
        module = Attention("swin", windows.to(DEVICE))
        combined = torch.randn(4, HEADS, 6, 6, **options)
        attention_of_module(module, *heads(4, 6, **options), combined)[0].sum().backward()
        image = torch.randn(1, HEADS, 10, 10, **options, requires_grad=True)
        beit = Attention("beit", image_size=12, patch_size=4)
        attention_of_module(beit, *heads(4, 10, **options), image)[0].sum().backward()
    [cache.__wrapped__.cache_clear() for cache in caches]


def call(module=None, length=9, mask=None, **keywords):
    return attention_of_module(module or Attention(), *heads(3, length), mask, **keywords)


def swin_with(change):
    """Shifted windows whose handed-over bias was changed."""
    bias = new_bias(lambda: RelativeBias.swin((2, 3), HEADS))
    dense = (bias.dense() + swin_mask((4, 6), (2, 3), (1, 1), 1)[:, None]).detach()
    change(dense)
    return attention_of_module(Attention("swin", bias), *heads(4, 6), dense)


def plus(*place, value=1.0):
    return lambda dense: dense.__setitem__(place, dense[place] + value)


def said(function, *arguments, **keywords):
    """The error's message; empty where there is none."""
    try:
        function(*arguments, **keywords)
    except (ValueError, ImportError) as error:
        return str(error)
    return ""


MASKED = torch.zeros(1, HEADS, 9, 9, dtype=torch.float64)
MASKED[..., 7:] = torch.finfo(torch.float64).min
BEIT = {"image_size": 12, "patch_size": 4}
REFUSED = {
    "another model": (
        lambda: call(Attention("bert")),
        "onepeace_fast: expected a model of t5, mt5, umt5, swin, beit, got bert; use attn_implementation='sdpa'",
    ),
    "dropout": (
        lambda: call(dropout=0.1),
        "dropout: expected 0, got 0.1; attention has none of its probabilities: set the configuration's to 0",
    ),
    "probabilities": (lambda: call(output_attentions=True), "output_attentions: expected False, got True; *"),
    "decoder": (
        lambda: call(SimpleNamespace(config=SimpleNamespace(model_type="t5"), is_decoder=True)),
        "onepeace_fast: expected self-attention of an encoder, got a decoder's or cross attention; *",
    ),
    "causal": (
        lambda: call(SimpleNamespace(config=SimpleNamespace(model_type="mt5"), is_causal=True)),
        "onepeace_fast: expected self-attention of an encoder, got a decoder's or cross attention; *",
    ),
    "cross attention": (
        lambda: attention_of_module(Attention(), heads(3, 9)[0], *heads(3, 8)[1:], None),
        "onepeace_fast: expected self-attention of an encoder, got a decoder's or cross attention; *",
    ),
    "mask of pairs": (
        lambda: call(mask=torch.zeros(3, 1, 9, 9)),
        "attention_mask: expected one of tokens, [3, 9], got float32 [3, 1, 9, 9] on cpu",
    ),
    "numbers for a mask": (
        lambda: call(mask=PADDING.long()),
        "attention_mask: expected one of tokens, [3, 9], got int64 [3, 9] on cpu",
    ),
    "mask of another length": (
        lambda: call(mask=PADDING[:, :8]),
        "attention_mask: expected one of tokens, [3, 9], got bool [3, 8] on cpu",
    ),
    "bias of every sample": (
        lambda: call(position_bias=MASKED.repeat(3, 1, 1, 1)),
        "bias: expected one of all pairs for all samples, [1, 2, 9, 9], got float64 [3, 2, 9, 9] on cpu",
    ),
    "bias with a mask": (
        lambda: call(position_bias=MASKED),
        "bias: expected numbers that depend on the distance in [9] tokens alone, got others, such as those with a "
        "mask; use attn_implementation='sdpa'",
    ),
    "image's bias with a mask": (
        lambda: call(Attention("beit", **BEIT), 10, torch.randn(1, HEADS, 10, 10)),
        "bias: expected numbers that depend on the distance in [3, 3] tokens alone, got others, *",
    ),
    "another image": (
        lambda: call(Attention("beit", **BEIT), 9, torch.zeros(1, HEADS, 9, 9)),
        "images: expected [3, 3] patches, as configured, or a square of patches, got 8 patches",
    ),
    "window without a bias": (
        lambda: call(Attention("swin", RelativeBias.swin(3, HEADS)), 9),
        "attention_mask: expected the bias of windows [3, 3], got NoneType None",
    ),
    "windows of another number": (
        lambda: call(Attention("swin", RelativeBias.swin(3, HEADS)), 9, torch.zeros(2, HEADS, 9, 9)),
        "attention_mask: expected the bias of windows [3, 3], got float32 [2, 2, 9, 9] on cpu",
    ),
    "window with one hidden pair": (
        lambda: swin_with(plus(0, slice(None), 0, 1, value=-100.0)),
        "attention_mask: expected the bias and Swin's mask of shifted windows, got another one; *",
    ),
    "window with a mask of one head": (
        lambda: swin_with(plus(0, 1, value=-100.0)),
        "attention_mask: expected the bias and Swin's mask of shifted windows, got another one; *",
    ),
    "window with another mask": (
        lambda: swin_with(plus(3, slice(None), slice(0, 2), slice(3, 6), value=-1.0)),
        "attention_mask: expected the bias and Swin's mask of shifted windows, got another one; *",
    ),
    "version before": (lambda: require_version("5.22.1"), "expected at least 5.23 and below 6.0, got 5.22.1"),
    "version after": (lambda: require_version("6.0.0.dev0"), "expected at least 5.23 and below 6.0, got 6.0.0.dev0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_does_not_serve_is_refused_in_one_line(name):
    function, message = REFUSED[name]
    assert re.fullmatch(re.escape(message).replace(r"\*", ".*"), said(function))


@pytest.fixture
def masking(monkeypatch):
    """The one name of transformers that a mask is made with."""
    module = SimpleNamespace(bidirectional_mask_function=lambda *_: True)
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(masking_utils=module))
    monkeypatch.setitem(sys.modules, "transformers.masking_utils", module)
    return module.bidirectional_mask_function


def mask_of(function, kind="t5", mask=PADDING, keys=9):
    config = SimpleNamespace(model_type=kind)
    return padding_mask(
        q_length=9, kv_length=keys, mask_function=function, attention_mask=mask, config=config, batch_size=3
    )


def test_layers_get_the_mask_of_tokens_as_a_tensor_of_this_forward_pass(masking):
    got = mask_of(masking)
    assert torch.equal(got, PADDING) and got is not PADDING and got.data_ptr() != PADDING.data_ptr()
    assert mask_of(masking, mask=None) is None and mask_of(masking, "beit", None) is None


def test_masks_that_it_does_not_serve_are_refused(masking):
    other = "onepeace_fast: expected self-attention of an encoder, got a decoder's or another mask; "
    assert said(mask_of, lambda *_: True).startswith(other)
    assert said(mask_of, masking, keys=8).startswith(other)
    assert said(mask_of, masking, "beit") == "attention_mask: expected None for beit, got bool [3, 9] on cpu"
    assert "expected a model of t5, mt5, umt5, swin, beit, got bert" in said(mask_of, masking, "bert")


def test_the_versions_that_it_takes_are_the_extra_s():
    require_version("5.23.0"), require_version("5.30.1")
    text = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert 'transformers = ["transformers>=5.23,<6"]' in text


@pytest.mark.parametrize("found", [None, SimpleNamespace(__version__="4.57.1")], ids=["missing", "old"])
def test_missing_or_old_transformers_are_said_in_one_line(monkeypatch, found):
    monkeypatch.setitem(sys.modules, "transformers", found)
    assert re.fullmatch(r"transformers: cannot be used \(.*\); type: .*transformers\].*", said(register_attention))


def test_registration_gives_both_functions_their_name(monkeypatch):
    given = {}
    interfaces = {
        name: SimpleNamespace(register=lambda key, function, name=name: given.update({name: (key, function)}))
        for name in ("AttentionInterface", "AttentionMaskInterface")
    }
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(__version__="5.23.0", **interfaces))
    register_attention()
    assert {key for key, _ in given.values()} == {"onepeace_fast"}
    assert given["AttentionMaskInterface"][1] is padding_mask
    qkv = heads(3, 9)
    attention, module = given["AttentionInterface"][1], Attention()
    assert torch.equal(attention(module, *qkv, None)[0], attention_of_module(module, *qkv, None)[0])
    whole = torch.compile(lambda *qkv: attention(module, *qkv, None)[0], backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="omit fullgraph=True"):
        whole(*qkv)
