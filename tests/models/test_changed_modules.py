"""Modules that a user replaced, wrapped or hooked: both backends compute what they say, in every training step."""

import dataclasses
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from models._small import (
    BACKENDS,
    assert_close,
    at_tokens,
    batch_of,
    small_config,
    small_model,
    valid_tokens,
    weighted_sum,
    with_gradients,
)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrize, prune

from onepeace_fast import RoutePlan
from onepeace_fast.layers import plain, transformer

PROJECTIONS = [f"layers.0.self_attn.{name}_proj" for name in "qkv"] + ["layers.0.self_attn.out_proj"]
NORMS = [
    *("layers.0.self_attn.ln", "layers.0.self_attn_layer_norm", "layers.0.attn_ln", "layers.0.final_layer_norm"),
    *("layers.0.text_ffn.2", "image_layer_norm"),
]
FFN = [f"layers.0.text_ffn.{name}" for name in ("0.wi_0", "0.wi_1", "3")]
OTHERS = ["layers.0.text_ffn.0", "layers.0.text_ffn.1", "layers.0.image_ffn", "layers.0.self_attn", "layers.0"]
TABLE = "text_adapter.rel_pos_table_list.0"
EVERY_PART = [*PROJECTIONS, *NORMS, *FFN, *OTHERS]
CONFIG = small_config(layers=1, attention_layer_norm=True)
BATCH = batch_of(text=[3, 1], image=(2, 2))
PLAN = RoutePlan.from_lengths({"text": [2], "image": [3]})

pytestmark = pytest.mark.filterwarnings("ignore")  # of parts that are not fused


def as_on_a_gpu(z):
    return True


@pytest.fixture(autouse=True)
def joined_weights(monkeypatch):
    """Queries, keys and values in one tensor where they may."""
    monkeypatch.setattr(transformer, "projects_together", as_on_a_gpu)


class Wrapper(nn.Module):
    """Another class around a module, as adapters of low rank are."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.factor = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, *arguments):
        return self.inner(*arguments) * self.factor


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Quantized(torch.Tensor):
    """A weight whose products are not those of the numbers that it stores."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if function in (F.linear, F.layer_norm):
                args = [_doubled(value) for value in args]
                kwargs = {key: _doubled(value) for key, value in (kwargs or {}).items()}
            return function(*args, **(kwargs or {}))


def _doubled(value):
    return 2 * value.as_subclass(torch.Tensor) if isinstance(value, Quantized) else value


def wrap(owner, place, module):
    owner._modules[place] = Wrapper(module)


def subclass(owner, place, module):
    kind = type(module)
    module.__class__ = type(f"My{kind.__name__}", (kind,), {"forward": lambda self, *a: 1.5 * kind.forward(self, *a)})


def patch(owner, place, module):
    original = module.forward
    module.forward = lambda *arguments: 1.5 * original(*arguments)


def hook(kind, function):
    return lambda owner, place, module: getattr(module, f"register_{kind}_hook")(function)


def by_torch(function, *arguments):
    return lambda owner, place, module: function(module, *arguments)


def quantize(owner, place, module):
    weight = module._parameters.pop("weight").detach()
    module._parameters["weight"] = weight.as_subclass(Quantized)


ON_ALL = {
    "wrapped": wrap,
    "subclass": subclass,
    "patched forward": patch,
    "forward hook": hook("forward", lambda _, inputs, output: 1.5 * output),
    "forward pre-hook": hook("forward_pre", lambda _, x: (1.5 * x[0] + 0.1, *x[1:])),
    "backward hook": hook("full_backward", lambda _, into, out: (2 * into[0], *into[1:])),
    "backward pre-hook": hook("full_backward_pre", lambda _, out: (2 * out[0],)),
}
ON_WEIGHTS = {
    "parametrized": by_torch(parametrize.register_parametrization, "weight", Double()),
    "pruned": by_torch(prune.l1_unstructured, "weight", 0.5),
    "quantized": quantize,
}
ON_LINEARS = {
    "old weight_norm": by_torch(nn.utils.weight_norm),
    "old spectral_norm": by_torch(nn.utils.spectral_norm),
    "weight_norm": by_torch(nn.utils.parametrizations.weight_norm),
    "spectral_norm": by_torch(nn.utils.parametrizations.spectral_norm),
}


def change_eps(owner, place, module):
    module.eps = 0.5


def toggle_bias(owner, place, module):
    count = module.weight.shape[0]
    bias = torch.linspace(-1, 1, count, dtype=torch.float64)
    module.register_parameter("bias", nn.Parameter(bias) if module.bias is None else None)


def without_affine(owner, place, module):
    owner._modules[place] = nn.LayerNorm(module.normalized_shape, elementwise_affine=False)


SETTINGS = (
    [(part, change_eps) for part in NORMS]
    + [(part, toggle_bias) for part in (*PROJECTIONS, *FFN, *NORMS)]
    + [(part, without_affine) for part in NORMS]
)


def change_place(module, part, change):
    owner, _, place = part.rpartition(".")
    change(module.get_submodule(owner), place, module.get_submodule(part))


def descend(model, run, rate):
    """What ``run`` finds in two steps of descent."""
    found = {}
    for step in range(2):
        torch.manual_seed(step)
        found |= {f"{name} of step {step}": value for name, value in run(model).items()}
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= rate * parameter.grad
    return found


def two_steps(backend, part, change, config=CONFIG, training=False):
    """Outputs and gradients of two steps of descent of a model that was changed."""
    torch.manual_seed(0)
    model = small_model(backend, config).train(training)
    if change is not None:
        change_place(model.encoder_wrapper, part if "adapter" in part else f"fusion_model.{part}".rstrip("."), change)
    return descend(model, partial(with_gradients, batch=BATCH), 0.05)


PLAIN = two_steps("reference", "", None)


def check_obeyed(part, change, steps=two_steps, plain=PLAIN, **keywords):
    reference, fused = (steps(backend, part, change, **keywords) for backend in BACKENDS)
    assert_close(fused, reference, 1e-9)
    same = all(torch.equal(reference[name], plain[name]) for name in set(reference) & set(plain))
    assert not same, "the change changes nothing"


@pytest.mark.parametrize("change", ["wrapped", "backward hook"])
@pytest.mark.parametrize("part", EVERY_PART)
def test_every_part_is_obeyed_by_both_backends(part, change):
    check_obeyed(part, ON_ALL[change])


JOINED = small_config(layers=1)  # without a norm behind it the output projection is in one op with the residual
PLAIN_JOINED = two_steps("reference", "", None, config=JOINED)


@pytest.mark.parametrize(
    ("part", "change"),
    [(part, change) for part in ("self_attn.out_proj", "self_attn") for change in ON_ALL]
    + [("self_attn.out_proj", change) for change in ON_WEIGHTS],
)
def test_what_ends_attention_s_branch_is_obeyed_by_both_backends(part, change):
    check_obeyed(f"layers.0.{part}", (ON_ALL | ON_WEIGHTS)[change], plain=PLAIN_JOINED, config=JOINED)


@pytest.mark.parametrize("change", ["wrapped", "forward hook", "backward pre-hook"])
def test_a_table_of_the_bias_is_obeyed_by_both_backends(change):
    check_obeyed(TABLE, ON_ALL[change])


@pytest.mark.parametrize("change", sorted(set(ON_ALL) - {"wrapped", "backward hook"}))
@pytest.mark.parametrize("part", [PROJECTIONS[1], NORMS[3], FFN[1], *OTHERS[2:]])
def test_every_change_is_obeyed_by_both_backends(part, change):
    check_obeyed(part, ON_ALL[change])


@pytest.mark.parametrize("change", ON_WEIGHTS)
@pytest.mark.parametrize("part", [PROJECTIONS[2], PROJECTIONS[3], *NORMS[::2], FFN[0], FFN[2]])
def test_a_changed_weight_is_obeyed_by_both_backends(part, change):
    check_obeyed(part, ON_WEIGHTS[change])


@pytest.mark.parametrize("change", ON_LINEARS)
@pytest.mark.parametrize("part", [PROJECTIONS[0], FFN[1]])
def test_a_normalised_weight_is_obeyed_by_both_backends(part, change):
    check_obeyed(part, ON_LINEARS[change], training="spectral" in change)  # which is called as often by both


@pytest.mark.parametrize(("part", "change"), SETTINGS, ids=lambda value: getattr(value, "__name__", value))
def test_settings_of_one_module_are_obeyed_by_both_backends(part, change):
    check_obeyed(part, change)


@pytest.mark.parametrize("part", [PROJECTIONS[0], *NORMS[1:5], FFN[0], OTHERS[2]])
def test_a_changed_part_runs_on_the_samples_that_drop_path_keeps(part):
    config = small_config(layers=2, attention_layer_norm=True, drop_path_rate=0.7)
    check_obeyed(part, ON_ALL["wrapped"], config=config, training=True)


@pytest.mark.parametrize("change", [change for change in ON_ALL if "hook" in change])
def test_hooks_of_the_whole_stack_are_obeyed_by_both_backends(change):
    check_obeyed("", ON_ALL[change])


def test_dynamic_quantization_is_obeyed_by_both_backends():
    outputs = []
    for backend in BACKENDS:
        model = small_model(backend, CONFIG, dtype=torch.float32)
        with torch.no_grad():
            model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
            batch = batch_of(text=[3, 3], image=(2, 2), dtype=torch.float32)
            outputs.append(at_tokens(model.encode(**batch), valid_tokens(batch)))
    # The scale of an activation follows from the rows that a call sees.
    assert_close(*outputs, 0.1)


def test_a_changed_part_is_said_once_in_one_line_and_a_plain_model_says_nothing():
    plain._warn.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        two_steps("fused", "", None)
        assert not [w for w in caught if "fused" in str(w.message)]
        two_steps("fused", FFN[0], wrap)
        two_steps("fused", PROJECTIONS[0], wrap)
        two_steps("fused", PROJECTIONS[1], ON_ALL["forward hook"])
    assert [str(warning.message) for warning in caught] == [
        "FFN: expected a plain Sequential, to be fused, got a Sequential with hooks, a forward, weights or settings of "
        "its own; this part runs through its modules and costs time",
        "q_proj, k_proj, v_proj: expected a plain Linear, to be fused, got Wrapper; this part runs through its modules "
        "and costs time",
        "q_proj, k_proj, v_proj: expected a plain Linear, to be fused, got a Linear with hooks, a forward, weights or "
        "settings of its own; this part runs through its modules and costs time",
    ]


def test_that_the_host_reads_the_device_for_modules_that_are_not_fused_is_said_once():
    plain._warn.cache_clear()
    offsets = torch.tensor([0, 2, 5], dtype=torch.int32)
    known, unknown = (dataclasses.replace(PLAN, offsets=offsets, row_counts=counts) for counts in ((2, 3), ()))
    norms, x = [nn.LayerNorm(4), nn.LayerNorm(4)], torch.zeros(5, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plain.by_modality(norms, x, unknown)  # on a CPU there is nothing to wait for
        plain.by_modality(norms, x, dataclasses.replace(known, offsets=offsets.to("meta")))
        assert not caught
        for _ in range(2):
            with pytest.raises(NotImplementedError):  # no host reads the device that stands for a GPU here
                plain.by_modality(norms, x, dataclasses.replace(unknown, offsets=offsets.to("meta")))
    said = [str(warning.message) for warning in caught]
    assert len(said) == 1 and said[0].startswith("plan: expected row counts") and "\n" not in said[0]


def by_checkpoints(model):
    layers = model.encoder_wrapper.fusion_model.layers
    for i, layer in enumerate(layers):
        layers[i] = checkpoint_wrapper(layer)
    return model


def by_compile(model):
    for layer in model.encoder_wrapper.fusion_model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    return model


def by_shards(model):
    transformer = model.encoder_wrapper.fusion_model
    for module in (*transformer.layers, transformer):
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    return model


def by_replicas(model):
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


def run_wrapped(wrap, backend="fused"):
    model = wrap(small_model(backend, CONFIG))
    outputs = model("encode", **BATCH)
    weighted_sum(outputs, valid_tokens(BATCH)).backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        if (grad := parameter.grad) is not None:
            name = name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")
            gradients[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return at_tokens(outputs, valid_tokens(BATCH)) | gradients


@pytest.mark.parametrize(
    ("wrap", "backend"),
    [*((wrap, "fused") for wrap in (by_checkpoints, by_compile, by_shards, by_replicas)), (by_shards, "reference")],
)
def test_wrappers_that_leave_the_parameters_plain_stay_fused(wrap, backend, group, recwarn):
    expected = run_wrapped(lambda model: model, backend)
    plain._warn.cache_clear()
    found = run_wrapped(wrap, backend)
    assert not [str(warning.message) for warning in recwarn if "to be fused" in str(warning.message)]
    assert_close({name: found[name] for name in expected}, expected, 1e-12)


@pytest.mark.parametrize("part", ["layers.0.self_attn.v_proj", "layers.0.attn_ln", "layers.0.text_ffn.3"])
def test_a_layer_with_a_changed_part_compiles_to_one_graph(part):
    results = []
    for compiled in (False, True):
        model = small_model("fused", CONFIG)
        change_place(model.encoder_wrapper.fusion_model, part, wrap)
        torch.compiler.reset()
        results.append(with_gradients(by_compile(model) if compiled else model, BATCH))
    assert_close(results[1], results[0], 1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_changed_parts_run_in_half_precision_as_the_reference_does(autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    batch, results = batch_of(text=[3, 1], image=(2, 2), dtype=dtype), []
    for backend in BACKENDS:
        model = small_model(backend, CONFIG, dtype=dtype)
        for module in model.encoder_wrapper.fusion_model.modules():
            module.register_forward_hook(lambda *_: None)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            results.append(with_gradients(model, batch))
    assert {value.dtype for value in results[1].values()} == {dtype}
    assert_close(results[1], results[0], 0.1)


@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_positions_that_a_module_gives_are_called_and_not_read(backend):
    model = small_model(backend, dtype=torch.float32)
    adapter, called = model.decoder_wrapper.adapter("text"), []
    adapter.embed_positions.register_forward_hook(lambda *_: called.append(1))
    nn.utils.weight_norm(adapter.embed_positions)
    hidden = torch.tensor([[False, True, False, False], [False, False, True, True]])
    for _ in range(2):
        text = torch.randint(4, 9, (2, 3))
        model.reconstruct(text=text, masks={"text": hidden})["text"].sum().backward()
    assert len(called) >= 2 and adapter.embed_positions.weight_v.grad is not None
