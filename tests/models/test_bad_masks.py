"""Masks and losses that do not fit: one line naming the caller's own argument, before any work."""

import pytest
import torch
from models._refusal import refuse
from models._small import BACKENDS, batch_of, hide, image_batch, small_model, valid_tokens
from models.test_passes import audio_language, vision_language

TWO = {"text": torch.full((2, 3), 5), "image": torch.zeros(2, 3, 32, 32)}


def masked(**changes):
    """Masks for two rows of 3 tokens and 4 patches, with changes; None removes one."""
    masks = {
        "text": torch.tensor([[False, True, False, False]] * 2),
        "image": torch.tensor([[False, True, True, False, False]] * 2),
    }
    return {name: value for name, value in {**masks, **changes}.items() if value is not None}


MASKS = {
    "a missing mask": (masked(image=None), "masks: expected exactly one for each of ['image', 'text'], got ['text']"),
    "a mask too many": (masked(audio=torch.zeros(2, 4, dtype=torch.bool)), "'text'], got ['audio', 'image', 'text']"),
    "a mask of another shape": (
        masked(text=torch.zeros(2, 3, dtype=torch.bool)),
        "masks['text']: expected bool [2, 4], CLS first, got bool [2, 3] on cpu",
    ),
    "a mask of another dtype": (masked(text=torch.zeros(2, 4)), "got float32 [2, 4]"),
    "a mask of another rank": (masked(text=torch.zeros(4, dtype=torch.bool)), "[rows, length], got bool [4]"),
    "a mask on another device": (
        masked(text=torch.zeros(2, 4, dtype=torch.bool, device="meta")),
        "masks['text']: expected a tensor on cpu, got one on meta",
    ),
    "a hidden CLS": (masked(image=torch.eye(2, 5, dtype=torch.bool)), "column 0, got True there"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", MASKS)
def test_reconstruct_refuses_masks(case, backend, monkeypatch):
    masks, expected = MASKS[case]
    model = small_model(backend, dtype=torch.float32)
    refuse(expected, lambda: model.reconstruct(**TWO, masks=masks), monkeypatch)


def loss_call(model, task):
    """A loss as a function of its masks, and masks that are right."""
    name, inputs = task()
    return lambda masks: model(name, **inputs | {"masks": masks}), inputs["masks"]


TERMS = [(task, term) for task in (vision_language, audio_language) for term in task()[1]["masks"]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("task", "term"), TERMS)
def test_a_loss_refuses_a_term_without_any_hidden_token(task, term, backend, monkeypatch):
    call, masks = loss_call(small_model(backend), task)
    assert call(masks)["loss"].isfinite()
    nothing, only_padding = torch.zeros_like(masks[term]), torch.zeros_like(masks[term])
    only_padding[1, -1] = "image" not in term
    for mask in (nothing, only_padding):
        expected = f"masks[{term!r}]: expected at least one hidden token"
        refuse(expected, lambda mask=mask: call({**masks, term: mask}), monkeypatch)
    missing = {name: mask for name, mask in masks.items() if name != term}
    refuse("masks: expected", lambda: call(missing), monkeypatch)


@pytest.mark.parametrize(("task", "term"), TERMS)
def test_a_loss_names_the_mask_that_hides_cls_or_has_another_shape(task, term, monkeypatch):
    call, masks = loss_call(small_model("fused"), task)
    at_cls = masks[term].clone()
    at_cls[0, 0] = True
    for bad in (at_cls, masks[term][:, 1:], masks[term].tolist()):
        refuse(f"masks[{term!r}]", lambda bad=bad: call({**masks, term: bad}), monkeypatch)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reconstruct_takes_audio_of_which_every_frame_is_hidden(backend):
    """The position convolutions have no frame to see."""
    model, batch = small_model(backend), batch_of(audio=[5, 4])
    masks = {"audio": valid_tokens(batch)["audio"].clone()}
    masks["audio"][:, 0] = False
    assert model.reconstruct(**batch, masks=masks)["audio"].isfinite().all()


def test_a_loss_over_a_single_real_token_is_zero():
    """Smoothing has no other class to go to."""
    model, text, image = small_model("fused"), torch.tensor([[5]]), image_batch(1, 1)
    masks = hide({"text": text, "image": image})
    masks |= {f"vl_{name}": mask for name, mask in masks.items()}
    losses = model.vision_language_loss(text=text, image=image, masks=masks, label_smoothing=0.1)
    assert losses["dcl_text_loss"].item() == pytest.approx(0.0, abs=1e-12)


def test_a_loss_names_its_own_arguments_where_rows_differ(monkeypatch):
    model, (_, inputs) = small_model("fused"), vision_language()
    inputs["image"] = inputs["image"][:2]
    expected = "text, image: expected a pair in every row, got 3 and 2 rows"
    message = refuse(expected, lambda: model.vision_language_loss(**inputs), monkeypatch)
    assert "samples:" not in message, "the loss takes no samples"


@pytest.mark.parametrize("smoothing", [-0.1, 1.5, float("nan")])
def test_a_loss_refuses_a_smoothing_that_is_no_probability(smoothing, monkeypatch):
    model, (name, inputs) = small_model("fused"), vision_language()
    refuse("label_smoothing", lambda: model(name, **inputs, label_smoothing=smoothing), monkeypatch)


def test_a_refused_loss_changes_neither_parameters_nor_gradients():
    model = small_model("fused")
    with torch.no_grad():
        model.logit_scale.fill_(7.0)  # the loss itself would clamp it
    call, masks = loss_call(model, vision_language)
    with pytest.raises(ValueError, match="vl_text"):
        call({**masks, "vl_text": torch.zeros_like(masks["vl_text"])})
    assert model.logit_scale.item() == 7.0
    assert not [name for name, grad in model.to_upstream_state_dict(grads=True).items() if grad is not None]
