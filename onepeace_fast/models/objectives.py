"""The objectives of both pretraining stages, each from one gradient-carrying encoder call and one decoder call.

(ONE-PEACE, arXiv 2305.11172, section 3.2. The passes are upstream's; the reference backend runs them one by one.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from onepeace_fast.checks import describe, require
from onepeace_fast.layers.adapter import with_unread
from onepeace_fast.layers.plain import refuse_advancing
from onepeace_fast.models.decoding import decode
from onepeace_fast.models.inputs import Batch, Hidden, read_batch
from onepeace_fast.models.losses import contrastive_loss, denoising_loss
from onepeace_fast.models.modalities import parameters_of

if TYPE_CHECKING:
    from onepeace_fast.models.pretrain import OnePeacePretrain


def vision_language_loss(
    model: OnePeacePretrain, text: Tensor, image: Tensor, masks: Mapping[str, Tensor], label_smoothing: float
) -> dict[str, Tensor]:
    """Stage 1; see ``OnePeacePretrain.vision_language_loss``."""
    _require_task(model, masks, {"text", "image", "vl_text", "vl_image"}, "image", image, text, label_smoothing)
    batch, (alone, pair) = read_batch(
        model.encoder.adapters, {"text": text, "image": image}, masks=masks,
        passes=[{"text": "text", "image": "image"}, {"text": "vl_text", "image": "vl_image"}],
    )  # fmt: skip
    _require_hidden({"text": alone, "image": alone, "vl_text": pair, "vl_image": pair})
    texts, images = batch.select("text"), batch.select("image")
    encoder = model.encoder
    tokens = encoder.tokens(batch)
    student_batches = [texts, images, batch]
    visible = [encoder.embed(b, h.kept, tokens) for b, h in zip(student_batches, (alone, alone, pair), strict=True)]
    teachers = [encoder.embed(one, None, tokens) for one in (texts, images)]
    text_teacher, image_teacher, *students = model.encoder_wrapper([*teachers, *visible])
    with torch.no_grad():
        (pair_teacher,) = model.encoder_wrapper([encoder.embed(batch, None, tokens)])
    contrast, i2t, t2i = contrastive_loss(
        model.project(image_teacher), model.project(text_teacher), model.logit_scale_exp()
    )
    text_rebuilt, image_rebuilt, pair_rebuilt = decode(model, student_batches, visible, students)
    together = pair_teacher.unpacked()
    losses = {
        "dcl_text_loss": _denoise(batch, text_rebuilt, text_teacher.unpacked(), "text", alone, label_smoothing),
        "dcl_image_loss": _denoise(batch, image_rebuilt, image_teacher.unpacked(), "image", alone, label_smoothing),
        "dcl_vl_text_loss": _denoise(batch, pair_rebuilt, together, "text", pair, label_smoothing),
        "dcl_vl_image_loss": _denoise(batch, pair_rebuilt, together, "image", pair, label_smoothing),
    }
    total = (
        contrast
        + 0.5 * losses["dcl_text_loss"]
        + losses["dcl_image_loss"]
        + 0.5 * (losses["dcl_vl_text_loss"] + losses["dcl_vl_image_loss"])
    )
    total = _with_others(model, {"text", "image"}, total)
    return {
        "loss": total, "itc_loss": contrast, **losses, "i2t_ncorrect": i2t, "t2i_ncorrect": t2i,
        "logit_scale_exp": model.logit_scale_exp(),
    }  # fmt: skip


def audio_language_loss(
    model: OnePeacePretrain,
    text: Tensor,
    audio: Tensor,
    audio_padding: Tensor | None,
    masks: Mapping[str, Tensor],
    label_smoothing: float,
) -> dict[str, Tensor]:
    """Stage 2; see ``OnePeacePretrain.audio_language_loss``."""
    _require_task(model, masks, {"audio", "al_text", "al_audio"}, "audio", audio, text, label_smoothing)
    batch, (alone, pair) = read_batch(
        model.encoder.adapters, {"text": text, "audio": audio, "audio_padding": audio_padding}, masks=masks,
        passes=[{"audio": "audio"}, {"text": "al_text", "audio": "al_audio"}],
    )  # fmt: skip
    _require_hidden({"audio": alone, "al_text": pair, "al_audio": pair})
    texts, audios = batch.select("text"), batch.select("audio")
    encoder = model.encoder
    tokens = encoder.tokens(batch)
    visible = [encoder.embed(b, h.kept, tokens) for b, h in ((audios, alone), (batch, pair))]
    audio_teacher, *students = model.encoder_wrapper([encoder.embed(audios, None, tokens), *visible])
    # After the passes with gradient: older torch's autocast keeps casts made without one, and gradients would be lost.
    with torch.no_grad():
        text_teacher, pair_teacher = model.encoder_wrapper([encoder.embed(one, None, tokens) for one in (texts, batch)])
        text_embedding = model.project(text_teacher)
    contrast, a2t, t2a = contrastive_loss(model.project(audio_teacher), text_embedding, model.logit_scale_exp())
    audio_rebuilt, pair_rebuilt = decode(model, [audios, batch], visible, students)
    together = pair_teacher.unpacked()
    losses = {
        "dcl_audio_loss": _denoise(batch, audio_rebuilt, together, "audio", alone, label_smoothing),
        "dcl_al_text_loss": _denoise(batch, pair_rebuilt, together, "text", pair, label_smoothing),
        "dcl_al_audio_loss": _denoise(batch, pair_rebuilt, together, "audio", pair, label_smoothing),
    }
    total = contrast + losses["dcl_audio_loss"] + 0.5 * (losses["dcl_al_text_loss"] + losses["dcl_al_audio_loss"])
    total = _with_others(model, {"text", "audio"}, total, *model.text_proj.parameters())
    return {
        "loss": total, "atc_loss": contrast, **losses, "a2t_ncorrect": a2t, "t2a_ncorrect": t2a,
        "logit_scale_exp": model.logit_scale_exp(),
    }  # fmt: skip


def require_masks(masks: Mapping[str, Tensor], names: set[str]) -> None:
    """Raise unless ``masks`` holds exactly these."""
    got = sorted(masks) if isinstance(masks, Mapping) else describe(masks)
    require(got == sorted(names), f"masks: got {got}, takes exactly one for each of {sorted(names)}")


def require_decoded(model: OnePeacePretrain, names: Sequence[str]) -> None:
    """Raise unless the decoder has these of the encoder's modalities."""
    for name in names:
        decoded = name in model.config.decoder.modalities or name not in model.config.encoder.modalities
        require(decoded, f"{name}: got a tensor to reconstruct, takes none: the decoder lacks this modality")


def _with_others(model: OnePeacePretrain, read: set[str], total: Tensor, *unread: nn.Parameter) -> Tensor:
    """The total; what trains of other modalities, and the given parameters, get gradients of zeros from it."""
    others = parameters_of(model, set(model.config.encoder.modalities) - read)
    return with_unread(total, *others, *unread)


def _require_task(
    model: OnePeacePretrain, masks: Mapping[str, Tensor], names: set[str], other: str, value: Tensor, text: Tensor,
    smoothing: float,
) -> None:  # fmt: skip
    require_decoded(model, sorted({"text", other}))
    require_masks(masks, names)
    rows = [len(tensor) if isinstance(tensor, Tensor) and tensor.dim() else 0 for tensor in (text, value)]
    require(rows[0] == rows[1], f"text, {other}: got {rows[0]} and {rows[1]} rows, takes a pair in every row")
    if model.encoder.resolved_backend == "fused" and model.training:
        refuse_advancing(model)
    require(0.0 <= smoothing < 1.0, f"label_smoothing: got {smoothing}, takes a probability in [0, 1)")


def _require_hidden(terms: Mapping[str, Hidden]) -> None:
    for term, hidden in terms.items():
        count = hidden.counts[term.split("_")[-1]]
        require(count > 0, f"masks[{term!r}]: got no hidden token in the whole batch, takes at least one for its loss")


def _denoise(
    batch: Batch, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], name: str, hidden: Hidden,
    smoothing: float,
) -> Tensor:  # fmt: skip
    lengths = batch.valid.lengths[name]
    return denoising_loss(
        student[name], teacher[name], batch.valid.masks[name], sum(lengths) - len(lengths), hidden.masks[name],
        hidden.counts[name], smoothing,
    )  # fmt: skip
