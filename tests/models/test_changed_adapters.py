"""Adapters and stacks that a user wrapped, hooked or changed: both backends compute what they say in every pass."""

import warnings

import pytest
import torch
from models._small import BACKENDS, assert_close, losses_with_gradients, small_config, small_model
from models.test_changed_modules import (
    ON_ALL,
    Double,
    Wrapper,
    by_torch,
    change_place,
    check_obeyed,
    descend,
    hook,
    wrap,
)
from models.test_passes import audio_language, vision_language
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrize

from onepeace_fast.layers import plain

ADAPTERS = [f"{stack}_wrapper.{name}_adapter" for stack in ("encoder", "decoder") for name in ("text", "image")]
STACKS = ["encoder_wrapper", "decoder_wrapper"]
CONFIG = small_config(decoder={"audio": None}, audio=None, layers=1, drop_path_rate=0.3)

pytestmark = pytest.mark.filterwarnings("ignore")  # of parts that are not fused


def shifted(_, inputs):
    value = inputs[0]
    return (1.5 * value if value.is_floating_point() else (value + 3) % 30, *inputs[1:])


def scaled_passes(_, inputs):
    passes = [{name: tokens._replace(x=1.5 * tokens.x) for name, tokens in one.items()} for one in inputs[0]]
    return (passes, *inputs[1:])


CHANGES = ON_ALL | {
    "forward pre-hook": hook("forward_pre", shifted),
    "backward hook": hook("full_backward", lambda _, into, out: tuple(g if g is None else 2 * g for g in into)),
}


def two_steps(backend, part, change):
    """Losses and gradients of two steps of descent of a model that was changed."""
    model, (name, inputs) = small_model(backend, CONFIG).train(), vision_language()
    if change is not None:
        change_place(model, part, change)
    return descend(model, lambda model: losses_with_gradients(model, name, inputs), 0.02)


PLAIN = two_steps("reference", "", None)
OBEYED = {"steps": two_steps, "plain": PLAIN}


@pytest.mark.parametrize("part", ADAPTERS)
@pytest.mark.parametrize("change", ["wrapped", "backward pre-hook"])
def test_every_adapter_is_called_for_every_pass_by_both_backends(part, change):
    check_obeyed(part, CHANGES[change], **OBEYED)


@pytest.mark.parametrize("part", ADAPTERS[1::2])
@pytest.mark.parametrize("change", sorted(set(CHANGES) - {"wrapped", "backward pre-hook"}))
def test_every_change_of_an_adapter_is_obeyed_by_both_backends(part, change):
    if part == ADAPTERS[1] and change == "backward hook":
        pytest.skip("images have no gradient")
    check_obeyed(part, CHANGES[change], **OBEYED)


@pytest.mark.parametrize("part", ADAPTERS[:2])
def test_a_changed_parameter_of_an_adapter_is_obeyed_by_both_backends(part):
    check_obeyed(part, by_torch(parametrize.register_parametrization, "cls_embedding", Double()), **OBEYED)


@pytest.mark.parametrize("part", STACKS)
def test_hooks_of_a_stack_see_every_pass_and_may_change_it(part):
    check_obeyed(part, hook("forward_pre", scaled_passes), **OBEYED)


@pytest.mark.parametrize("change", ["forward hook", "wrapped"])
def test_the_decoder_s_transformer_is_obeyed_by_both_backends(change):
    reference, fused = (two_steps(b, "decoder_wrapper.fusion_model", CHANGES[change]) for b in BACKENDS)
    assert_close(fused, reference, 1e-9)
    assert not torch.equal(reference["loss of step 0"], PLAIN["loss of step 0"])


called = []


class Around(nn.Module):
    """A class of a user's own that passes everything on."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *arguments):
        called.append(self)
        return self.inner(*arguments)


@pytest.mark.parametrize("around", [Around, checkpoint_wrapper], ids=["user's own", "checkpoint_wrapper"])
@pytest.mark.parametrize("part", [*STACKS, ADAPTERS[1], ADAPTERS[2]])
def test_a_module_around_a_part_changes_nothing_and_is_called(part, around):
    def put_around(owner, place, module):
        owner._modules[place] = around(module)

    called.clear()
    found = two_steps("fused", part, put_around)
    assert called or around is not Around
    found = {key.replace("inner.", "").replace("_checkpoint_wrapped_module.", ""): v for key, v in found.items()}
    assert_close(found, PLAIN, 1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_adapters_of_audio_and_an_unwatched_one_beside_it(backend):
    """Only the watched adapter is called for every pass; the other's embeddings are shared by all of them."""
    model, calls = small_model(backend), {"text": 0, "audio": 0}
    inner = model.encoder.adapter("text").embed_tokens
    inner.register_forward_hook(lambda *_: calls.update(text=calls["text"] + 1))
    model.encoder_wrapper.audio_adapter.register_forward_hook(lambda *_: calls.update(audio=calls["audio"] + 1))
    model(*audio_language()[:1], **audio_language()[1])
    assert calls == {"text": 3 if backend == "reference" else 1, "audio": 4}


def test_a_watched_adapter_is_said_once_in_one_line():
    plain._warn.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        two_steps("fused", ADAPTERS[1], wrap)
        two_steps("fused", ADAPTERS[0], CHANGES["forward hook"])
    said = [str(warning.message) for warning in caught if "_adapter" in str(warning.message)]
    assert said[0].startswith("image_adapter: expected a plain Adapter, to be fused, got Wrapper;")
    assert said[1].startswith("text_adapter: expected a plain TextAdapter, to be fused, got a") and len(said) == 2


@pytest.mark.parametrize("part", [*STACKS, ADAPTERS[1]])
def test_a_part_without_what_it_stands_for_is_refused_in_one_line(part):
    model = small_model("fused")
    change_place(model, part, lambda owner, place, module: owner._modules.update({place: nn.Linear(1, 1)}))
    name, inputs = vision_language()
    with pytest.raises(ValueError, match=r"^expected a \w+ or a module around one, got Linear$"):
        model(name, **inputs)


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
@pytest.mark.parametrize("part", ["encoder_wrapper.fusion_model.layers.0.self_attn.q_proj", "text_mask_head"])
def test_a_weight_that_every_call_changes_is_refused_where_passes_are_joined(part, norm):
    (name, inputs), models = vision_language(), [small_model(backend, CONFIG) for backend in BACKENDS]
    for model in models:
        torch.manual_seed(0)
        norm(model.get_submodule(part))
    losses = [model(name, **inputs)["loss"] for model in models]
    torch.testing.assert_close(*losses)  # in evaluation nothing advances
    reference, fused = (model.train() for model in models)
    with pytest.raises(ValueError, match=rf"^{part}[^\n]*: expected [^\n]*, got spectral_norm, [^\n]*$"):
        fused(name, **inputs)
    reference(name, **inputs)["loss"].backward()


def test_what_is_put_around_an_adapter_is_trained_with_it():
    model = small_model("fused")
    change_place(model, "encoder_wrapper.audio_adapter", wrap)
    model.train_only("audio")
    assert isinstance(model.encoder_wrapper.audio_adapter, Wrapper)
    assert model.encoder_wrapper.audio_adapter.factor.requires_grad
