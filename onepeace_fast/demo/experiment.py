"""What the demo does: train a small ONE-PEACE in two stages, and measure the retrieval that no stage trained for.

Stage 1 learns from images and captions. Stage 2 learns from sounds and captions, while attention and all that belongs
to text and image are frozen. (ONE-PEACE, arXiv 2305.11172, section 3.3.) No image is ever paired with a sound.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from onepeace_fast.config import (
    AudioAdapterConfig,
    ImageAdapterConfig,
    OnePeaceConfig,
    TextAdapterConfig,
    TransformerConfig,
)
from onepeace_fast.demo import data
from onepeace_fast.demo.data import SIDE, Digits, Vocabulary, caption, draw_captions, draw_rows, enlarge
from onepeace_fast.demo.speech import Speech
from onepeace_fast.demo.training import fit
from onepeace_fast.demo.waveform import WINDOW, waveforms
from onepeace_fast.layers.adapters import PATCH
from onepeace_fast.models.losses import contrastive_loss
from onepeace_fast.models.pretrain import OnePeacePretrain
from onepeace_fast.training.masks import audio_language_masks, vision_language_masks

WIDTH = 128
GROUPS = 4  # of ten digits each in a training batch
ROWS = 100  # in a batch that is only embedded
# A few wide strides in place of ONE-PEACE's seven layers: as many frames, a quarter of the time.
FEATURE_LAYERS = ((32, 32, 16), (64, 4, 4), (128, 5, 5))


@dataclass(frozen=True)
class Steps:
    """Training steps of both stages."""

    image_text: int = 600
    audio_text: int = 600


def configuration(vocabulary_size: int, denoise: bool = False) -> OnePeaceConfig:
    """A ONE-PEACE small enough for a CPU. Contrast does not use its decoder, which is tiny unless it denoises."""
    grid = SIDE // PATCH
    audio = AudioAdapterConfig(
        feature_layers=FEATURE_LAYERS, position_layers=1, position_width=9, position_groups=16, bucket_size=64
    )
    encoder = TransformerConfig(
        embed_dim=WIDTH, ffn_embed_dim=2 * WIDTH, layers=4, attention_heads=4, drop_path_rate=0.1, layer_scale=None,
        text=TextAdapterConfig(bucket_size=32), image=ImageAdapterConfig(position_grid=grid, bias_grid=grid),
        audio=audio,
    )  # fmt: skip
    width = WIDTH // 2 if denoise else 16
    decoder = TransformerConfig(
        embed_dim=width, ffn_embed_dim=2 * width, layers=2 if denoise else 1, attention_heads=2, layer_scale=None,
        text=TextAdapterConfig(use_bias=False),
        image=ImageAdapterConfig(position_grid=grid, bias_grid=grid, use_bias=False) if denoise else None,
        audio=AudioAdapterConfig(use_bias=False) if denoise else None,
    )  # fmt: skip
    return OnePeaceConfig(encoder=encoder, decoder=decoder, vocab_size=vocabulary_size)


def build(vocabulary_size: int, seed: int, denoise: bool = False) -> OnePeacePretrain:
    """The untrained model. Its initial weights suit the width of 1536; a narrow one needs larger ones to start."""
    torch.manual_seed(seed)
    model = OnePeacePretrain(configuration(vocabulary_size, denoise))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight *= (1536 / WIDTH) ** 0.5
    return model


def contrast(model: OnePeacePretrain, a: Tensor, b: Tensor) -> Tensor:
    """Contrast of embeddings [10 * groups, dim] inside each group of ten pairs, averaged over the groups."""
    scale = model.logit_scale_exp()
    return torch.stack([contrastive_loss(x, y, scale)[0] for x, y in zip(a.split(10), b.split(10), strict=True)]).mean()


def image_text_batch(digits: Digits, vocabulary: Vocabulary, generator: torch.Generator) -> dict[str, Tensor]:
    """Images of stage 1, each with a caption, as the model takes them."""
    rows = draw_rows(digits.labels, GROUPS, generator)
    text = vocabulary.encode(draw_captions(data.IMAGE_TEMPLATES, digits.labels[rows], generator))
    return {"text": text, "image": enlarge(digits.images[rows], generator)}


def audio_batch(speech: Speech, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """Sounds of stage 2 as the model takes them, and the digit that each says."""
    labels = torch.tensor(speech.labels, dtype=torch.int64, device="cpu")
    rows = draw_rows(labels, GROUPS, generator)
    return {"audio": waveforms([speech.sounds[row] for row in rows.tolist()], generator)}, labels[rows]


def image_text_contrast(model: OnePeacePretrain, text: Tensor, image: Tensor) -> Tensor:
    """The contrast of a batch of stage 1."""
    return contrast(model, model.embed(image=image), model.embed(text=text))


def train_image_text(
    model: OnePeacePretrain, digits: Digits, steps: int, vocabulary: Vocabulary, seed: int, denoise: bool = False
) -> list[float]:
    """Stage 1, in place; returns the contrast of every step."""
    generator = torch.Generator().manual_seed(seed)
    device = model.logit_scale.device

    def losses() -> tuple[Tensor, Tensor]:
        batch = image_text_batch(digits, vocabulary, generator)
        if denoise:
            return _denoised(model, "vision_language_loss", "itc_loss", batch["text"], batch["image"], generator)
        loss = image_text_contrast(model, batch["text"].to(device), batch["image"].to(device))
        return loss, loss

    return _train(model, losses, steps, "image-text")


def train_audio_text(
    model: OnePeacePretrain, speech: Speech, steps: int, vocabulary: Vocabulary, seed: int, denoise: bool = False
) -> list[float]:
    """Stage 2, in place: of the encoder only what belongs to audio trains. Returns the contrast of every step."""
    generator = torch.Generator().manual_seed(seed)
    device = model.logit_scale.device
    model.train_only("audio")
    captions = caption_embeddings(model, data.SOUND_TEMPLATES, vocabulary)

    def losses() -> tuple[Tensor, Tensor]:
        batch, labels = audio_batch(speech, generator)
        if denoise:
            text = vocabulary.encode(draw_captions(data.SOUND_TEMPLATES, labels, generator))
            return _denoised(model, "audio_language_loss", "atc_loss", text, batch["audio"], generator)
        which = torch.randint(len(captions), (len(labels),), generator=generator, device="cpu")
        # Text is frozen, so its embeddings need computing only once.
        loss = contrast(model, model.embed(audio=batch["audio"].to(device)), captions[which, labels])
        return loss, loss

    return _train(model, losses, steps, "audio-text")


def _denoised(
    model: OnePeacePretrain, task: str, contrast: str, text: Tensor, other: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The total of ONE-PEACE's objective and its contrast, each averaged over the groups of ten."""
    device = model.logit_scale.device
    totals, contrasts = [], []
    for captions, inputs in zip(text.split(10), other.split(10), strict=True):
        starts = captions > data.END
        if task == "vision_language_loss":
            name, masks = "image", vision_language_masks(captions, starts, (SIDE // PATCH) ** 2, generator)
        else:
            frames = model.encoder_wrapper.audio_adapter.frames(WINDOW)
            name, masks = "audio", audio_language_masks(captions, starts, [frames] * len(captions), generator)
        masks = {term: mask.to(device) for term, mask in masks.items()}
        found = model(task, text=captions.to(device), masks=masks, **{name: inputs.to(device)})
        totals.append(found["loss"])
        contrasts.append(found[contrast])
    return torch.stack(totals).mean(), torch.stack(contrasts).mean()


def _train(model: OnePeacePretrain, losses: Callable[[], tuple[Tensor, Tensor]], steps: int, stage: str) -> list[float]:
    """Step by the first of ``losses()`` and note the second, the contrast."""
    contrasts: list[float] = []

    def loss(_: int) -> Tensor:
        trained, noted = losses()
        contrasts.append(noted.item())
        return trained

    fit(model, loss, steps, stage, said=lambda _: statistics.mean(contrasts[-20:]))
    return contrasts


@torch.no_grad()
def caption_embeddings(model: OnePeacePretrain, templates: Sequence[str], vocabulary: Vocabulary) -> Tensor:
    """Every template filled in for every digit: [templates, 10, dim]."""
    device = model.logit_scale.device
    texts = [vocabulary.encode([caption(template, digit) for digit in range(10)]) for template in templates]
    return torch.stack([model.embed(text=text.to(device)) for text in texts])


@torch.no_grad()
def image_embeddings(model: OnePeacePretrain, images: Tensor) -> Tensor:
    """Images [rows, 8, 8] embedded one modality alone: [rows, dim] on the CPU."""
    device = model.logit_scale.device
    return torch.cat([model.embed(image=enlarge(chunk).to(device)).cpu() for chunk in images.split(ROWS)])


@torch.no_grad()
def sound_embeddings(model: OnePeacePretrain, sounds: Sequence[np.ndarray]) -> Tensor:
    """Sounds embedded alone: [rows, dim] on the CPU."""
    device = model.logit_scale.device
    chunks = [sounds[i : i + ROWS] for i in range(0, len(sounds), ROWS)]
    return torch.cat([model.embed(audio=waveforms(chunk).to(device)).cpu() for chunk in chunks])


def similarity(sounds: Tensor, images: Tensor) -> np.ndarray:
    """Cosines of normalised embeddings: [sounds, images]."""
    return (sounds @ images.t()).numpy()


def image_text_accuracy(
    model: OnePeacePretrain, images: Tensor, labels: Tensor, vocabulary: Vocabulary
) -> dict[str, float]:
    """For each held-out template: how many image embeddings find, among its ten captions, their own as the nearest."""
    captions = caption_embeddings(model, data.HELD_OUT_TEMPLATES, vocabulary).cpu()
    nearest = (captions @ images.t()).argmax(1)
    return {t: (row == labels).float().mean().item() for t, row in zip(data.HELD_OUT_TEMPLATES, nearest, strict=True)}


@torch.no_grad()
def bias_vectors(model: OnePeacePretrain, vocabulary: Vocabulary) -> dict[str, np.ndarray]:
    """Each modality's learned bias over distance, its CLS entries left out; see ``Result.bias_vectors``."""
    encoder = model.encoder_wrapper
    longest = max(len(caption(template, 0).split()) for template in data.IMAGE_TEMPLATES)
    grid = SIDE // PATCH
    widths = {"text": 2 + longest, "image": 1 + grid**2, "audio": 1 + encoder.audio_adapter.frames(WINDOW)}
    vectors = {name: encoder.adapter(name).bias_vectors(width)[0][:, :-3] for name, width in widths.items()}
    heads, side = len(vectors["image"]), 2 * grid - 1
    vectors["image"] = vectors["image"].view(heads, side, side)
    return {name: values.cpu().numpy() for name, values in vectors.items()}
