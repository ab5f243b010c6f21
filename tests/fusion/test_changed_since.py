"""What each family's fused computation would ignore, if it were changed after ``fuse``: the model's own code runs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from onepeace_fast import fuse, use_backend
from tests.fusion import _bagel, _mixture_of_transformers, _one_peace, _t5, _torchscale, _windows
from tests.fusion._checks import floats

TEXTS = {"src_tokens": torch.tensor([[5, 6, 7, 8], [9, 3, 1, 1], [4, 1, 1, 1]]), "encoder_type": "text"}
SCALE = (_one_peace.DIM // _one_peace.HEADS) ** -0.5


def one_peace(**options):
    return _one_peace.Wrapper(**options).eval()


MODELS = {
    "ONE-PEACE": (one_peace, TEXTS),
    "ONE-PEACE without norms": (lambda: one_peace(attn_ln=False, sub_norm=False), TEXTS),
    "T5": (_t5.model, _t5.batch()),
    "UMT5": (lambda: _t5.model("umt5"), _t5.batch()),
    "torchscale": (lambda: _torchscale.Real(_torchscale.make()), _torchscale.batch(0)),
    "Swin": (lambda: _windows.model("swin"), _windows.tokens(0, 2, 54)),
    "BEiT": (lambda: _windows.model("beit"), _windows.tokens(0, 3, 13)),
    "feed-forward": (_mixture_of_transformers.feed_forward, _mixture_of_transformers.feed_forward_batch(0)),
    "BAGEL": (_bagel.make, _bagel.batch(0)),
}


def with_function(make):
    """BAGEL whose activation is a function."""
    model = make()
    for layer in model.layers:
        for network in (layer.mlp, layer.mlp_moe_gen):
            del network.act_fn
            network.act_fn = F.silu
    return model


class Indexed(_windows.WindowBias):
    """With the table's rows in a buffer, as transformers' has them."""

    def __init__(self, window):
        super().__init__(window)
        self.register_buffer("relative_position_index", _windows.distances(window))

    def forward(self):
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)[None]


def with_index(make):
    model = make()
    for layer in model.layers:
        table = layer.attention.relative_position_bias.relative_position_bias_table
        layer.attention.relative_position_bias = Indexed((3, 3))
        layer.attention.relative_position_bias.relative_position_bias_table = table
    return model


MODELS |= {
    "BAGEL of functions": (lambda: with_function(_bagel.make), _bagel.batch(0)),
    "Swin with an index": (lambda: with_index(MODELS["Swin"][0]), MODELS["Swin"][1]),
}


class Twice(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *arguments, **keywords):
        return 2 * self.inner(*arguments, **keywords)


def set_on(path, name, value):
    return lambda model: setattr(model.get_submodule(path), name, value)


def norm(width):
    made = nn.LayerNorm(width)
    made.weight = nn.Parameter(torch.linspace(0.5, 2, width))
    return made


def bias(width):
    return nn.Parameter(torch.linspace(-1, 1, width))


def twice(path):
    def change(model):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Twice(model.get_submodule(path)))

    return change


def another_forward(path):
    """Of a class below the module's, as a user patches one."""

    def change(model):
        module = model.get_submodule(path)

        def forward(self, *arguments, **keywords):
            out, *others = super(kind, self).forward(*arguments, **keywords)
            return (2 * out, *others)

        kind = type("Patched", (type(module),), {"forward": forward})
        module.__class__ = kind

    return change


def double(value):
    """Twice the tensors of what a method returns, which may have them in a sequence."""
    return 2 * value if isinstance(value, torch.Tensor) else [2 * one if torch.is_tensor(one) else one for one in value]


def of_the_instance(path, method, change=double):
    """A method of one instance, as a user patches it."""

    def patch(model):
        module = model.get_submodule(path)
        own = getattr(module, method)
        setattr(module, method, lambda *arguments, **keywords: change(own(*arguments, **keywords)))

    return patch


LAYER, BLOCK = "fusion_model.layers.1", "encoder.block.1.layer.0.SelfAttention"
PATCHES = {
    "a layer's method": ("ONE-PEACE", of_the_instance(LAYER, "arrive"),
        f"{LAYER}: expected the class's arrive, got one of its own"),
    "T5's bias": ("T5", of_the_instance(BLOCK.replace("1", "0", 1), "compute_bias"),
        "block.0.layer.0.SelfAttention: expected the class's compute_bias, got one of its own"),
    "BAGEL's training": ("BAGEL", of_the_instance("", "forward_train"),
        "model: expected the class's forward_train, got one of its own"),
    "BAGEL's layer": ("BAGEL", of_the_instance("layers.1", "forward_train"),
        "layers.1: expected the class's forward_train, got one of its own"),
}  # fmt: skip
PATCHED_BEFORE = {
    **PATCHES,
    "an adapter's bias": ("ONE-PEACE", of_the_instance("text_adapter", "get_rel_pos_bias"),
        "text_adapter: expected the class's get_rel_pos_bias, got one of its own"),
}  # fmt: skip
CHANGES = {
    **PATCHES,
    "scaling": ("ONE-PEACE", set_on(f"{LAYER}.self_attn", "scaling", 1.0),
        f"{LAYER}.self_attn.scaling: expected {SCALE}, as when it was fused, got 1.0"),
    "activation": ("ONE-PEACE", set_on(f"{LAYER}.text_ffn.0.act", "approximate", "tanh"),
        f"{LAYER}.text_ffn.0.act.approximate: expected 'none', as when it was fused, got 'tanh'"),
    "table": ("ONE-PEACE", set_on("text_adapter.rel_pos_table_list.0", "max_norm", 0.1),
        "text_adapter.rel_pos_table_list.0.max_norm: expected None, as when it was fused, got 0.1"),
    "a module around a table": ("ONE-PEACE", twice("text_adapter.rel_pos_table_list.0"),
        "the bias is not that of the model's own adapters"),
    "norm of attention": ("ONE-PEACE without norms", lambda model: set_on(LAYER, "attn_ln", norm(32))(model),
        f"{LAYER}: expected no module attn_ln, got LayerNorm"),
    "gate's bias": ("ONE-PEACE", lambda model: set_on(f"{LAYER}.text_ffn.0.wi_0", "bias", bias(48))(model),
        f"{LAYER}.text_ffn.0.wi_0: expected no parameter bias, got one"),
    "T5's distances": ("T5", set_on(BLOCK.replace("1", "0", 1), "relative_attention_max_distance", 30),
        "block.0.layer.0.SelfAttention.relative_attention_max_distance: expected 10, as when it was fused, got 30"),
    "UMT5's distances": ("UMT5", set_on(BLOCK, "relative_attention_max_distance", 30),
        "block.1.layer.0.SelfAttention.relative_attention_max_distance: expected 10, as when it was fused, got 30"),
    "T5's attention": ("T5", another_forward(BLOCK),
        "expected the forward of SharedBiasAttention, got that of Patched"),
    "torchscale's bias": ("torchscale", set_on("model.encoder.layers.0.ffn.A.fc1", "bias", None),
        "layers.0.ffn.A.fc1: expected a parameter bias, got none"),
    "window": ("Swin", set_on("layers.1.attention.relative_position_bias", "window_size", (1, 9)),
        "relative_position_bias.window_size: expected (3, 3), as when it was fused, got (1, 9)"),
    "Swin's attention": ("Swin", another_forward("layers.1.attention"),
        "expected the forward of WindowAttention, got that of Patched"),
    "BEiT's attention": ("BEiT", another_forward("layers.1.attention"),
        "expected the forward of ImageAttention, got that of Patched"),
    "an expert's bias": ("feed-forward", lambda model: set_on("local_experts.1.w1", "bias", bias(48))(model),
        "local_experts.1.w1: expected no parameter bias, got one"),
    "an expert's layer": ("feed-forward", twice("local_experts.0.w1"),
        "local_experts.0.w1: expected the Linear that was fused, got Twice"),
    "BAGEL's function": ("BAGEL of functions", set_on("layers.1.mlp", "act_fn", F.gelu),
        f"layers.1.mlp.act_fn: expected {F.silu!r}, as when it was fused, got {F.gelu!r}"),
    "numbers of an index": ("Swin with an index",
        lambda model: model.layers[1].attention.relative_position_bias.relative_position_index.copy_(torch.zeros(9, 9)),
        "relative_position_bias.relative_position_index: expected the values with which it was fused, got others"),
    "BAGEL's bias": ("BAGEL", lambda model: set_on("layers.0.mlp.gate_proj", "bias", bias(48))(model),
        "layers.0.mlp.gate_proj: expected no parameter bias, got one"),
    "BAGEL's norm": ("BAGEL", twice("norm"), "norm: expected the Norm that was fused, got Twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_changed_is_obeyed(name):
    of, change, reason = CHANGES[name]
    make, batch = MODELS[of]
    model, plain = make(), make()
    unchanged = floats(plain(**batch))
    change(plain)
    expected = floats(plain(**batch))
    assert any(not torch.equal(value, unchanged[of]) for of, value in expected.items())
    handle = fuse(model)
    change(model)
    with use_backend("fused"):
        found = floats(model(**batch))
    for path, value in found.items():
        torch.testing.assert_close(value, expected[path], rtol=1e-4, atol=1e-5)
    assert [one for part in handle.parts.values() for one in part.calls if one] == [reason]


@pytest.mark.parametrize("name", PATCHED_BEFORE)
def test_a_method_that_was_set_on_an_instance_before_is_refused(name):
    of, change, reason = PATCHED_BEFORE[name]
    model = MODELS[of][0]()
    change(model)
    assert said(model) == [reason]


def said(model):
    """The reasons for which no part, or not every part, of a model is fused."""
    try:
        return [reason for _, _, reason in fuse(model).refused]
    except ValueError as error:
        return [str(error).partition("but ")[2].removesuffix("; 1 more parts were refused")]


REPLACED = {
    "ONE-PEACE": "fusion_model", "T5": "encoder", "UMT5": "encoder", "torchscale": "model.encoder",
    "Swin": "layers.1.attention", "BEiT": "layers.1", "feed-forward": "", "BAGEL": "",
}  # fmt: skip


@pytest.mark.parametrize("of", REPLACED)
def test_a_forward_that_was_set_on_the_instance_is_refused_and_kept(of):
    model = MODELS[of][0]()
    root = model.get_submodule(REPLACED[of])
    root.forward = set_on_it = lambda *arguments, **keywords: None
    kind = type(root).__name__
    advice = "take it off, fuse, then put it on again"
    message = f"forward: expected that of the class {kind}, got one set on the instance; {advice}"
    assert said(model) == [message]
    assert root.forward is set_on_it


def test_the_same_numbers_in_another_index_are_fused():
    model = MODELS["Swin with an index"][0]()
    handle = fuse(model)
    bias = model.layers[0].attention.relative_position_bias
    bias.relative_position_index.copy_(bias.relative_position_index.clone())
    model.layers[1].attention.relative_position_bias.relative_position_index = bias.relative_position_index.clone()
    with use_backend("fused"):
        model(**MODELS["Swin"][1])
    assert [dict(part.calls) for part in handle.parts.values()] == [{"": 1}, {"": 1}]


@pytest.mark.parametrize("of", ["Swin", "BEiT"])
def test_a_projection_without_a_weight_is_called(of):
    make, batch = MODELS[of]
    model = make()
    fuse(model)
    twice("layers.0.attention.o_proj")(model)
    expected = floats(model(**batch))
    with use_backend("fused"):
        found = floats(model(**batch))
    for path, value in found.items():
        torch.testing.assert_close(value, expected[path], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("of", ["ONE-PEACE", "T5", "torchscale"])
def test_an_exported_program_is_the_models_own(of):
    make, batch = MODELS[of]
    model = make()
    own = torch.export.export(model, (), batch, strict=False).graph_module.code
    fuse(model)
    with use_backend("fused"):
        assert torch.export.export(model, (), batch, strict=False).graph_module.code == own


@pytest.mark.slow
def test_own_code_runs_in_compiled_code():
    """Behind a break of the graph a bound method would be looked up by its name, and be the replacement."""
    model, batch = _mixture_of_transformers.make(), _mixture_of_transformers.batch(0)
    fuse(model)
    twice("feed_forward.1.local_experts.0.w1")(model)
    torch._dynamo.reset()
    with use_backend("fused"):
        expected = model(**batch)
        assert torch.equal(torch.compile(model, backend="eager")(**batch), expected)


# Windows' stand-ins make their own bias on the default device.
@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith(("Swin", "BEiT"))])
def test_another_default_device_changes_nothing(name):
    """That of the process is meta while the model is fused and while it is called."""
    make, batch = MODELS[name]
    model = make()
    with torch.no_grad(), torch.device("meta"):
        expected = floats(model(**batch))
        handle = fuse(model)
        with use_backend("fused"):
            found = floats(model(**batch))
    assert all(part.fused_calls for part in handle.report().parts), str(handle.report())
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, msg=key)
