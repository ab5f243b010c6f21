"""ONE-PEACE for pretraining: encoder, decoder, projections, and the losses of both stages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onepeace_fast._routing import copy_to_device
from onepeace_fast.backend import check_backend
from onepeace_fast.checks import describe, require
from onepeace_fast.config import OnePeaceConfig
from onepeace_fast.layers.adapters import init_linear, init_truncated_normal
from onepeace_fast.models import upstream
from onepeace_fast.models.inputs import Batch, Hidden, read_batch
from onepeace_fast.models.losses import contrastive_loss, denoising_loss
from onepeace_fast.models.reference import PaddedTokens
from onepeace_fast.models.stack import Encoded, Stack
from onepeace_fast.route_plan import RoutePlan

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
MAX_LOGIT_SCALE = math.log(100)
TASKS = ("encode", "embed", "reconstruct", "vision_language_loss", "audio_language_loss")


class OnePeacePretrain(nn.Module):
    """ONE-PEACE (arXiv 2305.11172) with both pretraining tasks; parameters carry upstream's names.

    Args:
        config: sizes and variants; the defaults are the public 4 B model's.
        backend: "reference" (padded, as upstream computes it), "fused" (packed), or None: automatic by device.
    """

    def __init__(self, config: OnePeaceConfig, backend: str | None = None) -> None:
        super().__init__()
        if backend is not None:
            check_backend(backend)
        self.config = config
        encoder, decoder = config.encoder, config.decoder
        self.encoder_wrapper = Stack(encoder, backend, config.vocab_size)
        self.decoder_wrapper = Stack(decoder, backend)
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE))
        for name in encoder.modalities:
            self.add_module(f"{name}_proj", init_linear(nn.Linear(encoder.embed_dim, encoder.embed_dim)))
            if name in decoder.modalities:
                self.add_module(f"decoder_{name}_embed", init_linear(nn.Linear(encoder.embed_dim, decoder.embed_dim)))
                token = nn.Parameter(init_truncated_normal(torch.empty(1, decoder.embed_dim)))
                self.register_parameter(f"{name}_mask_token", token)
                self.add_module(f"{name}_mask_head", init_linear(nn.Linear(decoder.embed_dim, encoder.embed_dim)))

    def forward(self, task: str, **inputs: Any) -> Any:
        """Call a method by its name, one of ``TASKS``, so that DistributedDataParallel and hooks see it."""
        require(task in TASKS, f"task: got {task!r}, takes one of {', '.join(TASKS)}")
        return getattr(self, task)(**inputs)

    def encode(
        self,
        *,
        text: Tensor | None = None,
        image: Tensor | None = None,
        audio: Tensor | None = None,
        audio_padding: Tensor | None = None,
        samples: Mapping[str, Tensor | Sequence[int]] | None = None,
    ) -> dict[str, Tensor]:
        """Encode any set of modalities together.

        Args:
            text: int64 [rows, length] token ids without CLS; 1 is padding.
            image: floating point [rows, 3, side, side], side a multiple of 16.
            audio: floating point [rows, samples] at 16 kHz, zero at padding.
            audio_padding: bool [rows, 1 + frames], CLS first, True at padding; None for none.
            samples: {modality: int64 [rows]}, the sample that each row belongs to; by default row i is sample i's.

        Returns:
            {modality: [rows, length, embed_dim]}, CLS first; rows at padding mean nothing.

        Raises:
            ValueError: an argument that does not fit, before any work.
        """
        batch, _ = read_batch(
            self.encoder_wrapper.adapters,
            text=text, image=image, audio=audio, audio_padding=audio_padding, samples=samples,
        )  # fmt: skip
        return self._encode(batch).unpacked()

    def embed(
        self,
        *,
        text: Tensor | None = None,
        image: Tensor | None = None,
        audio: Tensor | None = None,
        audio_padding: Tensor | None = None,
    ) -> Tensor:
        """Embed one modality for retrieval: its CLS, projected and L2-normalised, [rows, embed_dim]."""
        batch, _ = read_batch(
            self.encoder_wrapper.adapters, text=text, image=image, audio=audio, audio_padding=audio_padding
        )
        require(len(batch.inputs) == 1, f"text, image, audio: got {sorted(batch.inputs)}, takes exactly one")
        return self._project(self._encode(batch))

    def reconstruct(
        self,
        *,
        masks: Mapping[str, Tensor],
        text: Tensor | None = None,
        image: Tensor | None = None,
        audio: Tensor | None = None,
        audio_padding: Tensor | None = None,
        samples: Mapping[str, Tensor | Sequence[int]] | None = None,
    ) -> dict[str, Tensor]:
        """Encode the tokens that ``masks`` leave visible, put them back among mask tokens and decode all.

        ``masks`` is {modality: bool [rows, length]}, CLS first, True where a token is hidden from the encoder; the rest
        is as in ``encode``. Returns {modality: [rows, length, embed_dim]}.
        """
        given = {name for name, value in (("text", text), ("image", image), ("audio", audio)) if value is not None}
        self._require_decoded(given)
        _require_masks(masks, given)
        batch, (hidden,) = read_batch(
            self.encoder_wrapper.adapters, text=text, image=image, audio=audio, audio_padding=audio_padding,
            samples=samples, masks=masks, passes=[{name: name for name in masks}],
        )  # fmt: skip
        return self._reconstruct(batch, hidden)

    def vision_language_loss(
        self, *, text: Tensor, image: Tensor, masks: Mapping[str, Tensor], label_smoothing: float = 0.1
    ) -> dict[str, Tensor]:
        """Stage 1: image-text contrast, and denoising of text, image and both together.

        Args:
            text, image: a pair per row, as in ``encode``.
            masks: bool "text", "vl_text" [rows, 1 + length] and "image", "vl_image" [rows, 1 + patches].
            label_smoothing: of the denoising terms.

        Returns:
            Scalars under upstream's names; "loss" is the total, itc + 0.5 text + image + 0.5 vl_text + 0.5 vl_image.

        Raises:
            ValueError: an argument that does not fit, or a mask that hides nothing in the whole batch.
        """
        self._require_decoded({"text", "image"})
        _require_masks(masks, {"text", "image", "vl_text", "vl_image"})
        _require_pairs("image", image, text)
        _require_smoothing(label_smoothing)
        batch, (alone, pair) = read_batch(
            self.encoder_wrapper.adapters, text=text, image=image, masks=masks,
            passes=[{"text": "text", "image": "image"}, {"text": "vl_text", "image": "vl_image"}],
        )  # fmt: skip
        _require_hidden({"text": alone, "image": alone, "vl_text": pair, "vl_image": pair})
        text_teacher, image_teacher = (self._encode(batch.select(name)) for name in ("text", "image"))
        with torch.no_grad():
            pair_teacher = self._encode(batch).unpacked()
        itc, i2t, t2i = contrastive_loss(
            self._project(image_teacher), self._project(text_teacher), self.logit_scale_exp()
        )
        students = {
            "dcl_text_loss": (self._reconstruct(batch.select("text"), alone), text_teacher.unpacked(), "text", alone),
            "dcl_image_loss": (
                self._reconstruct(batch.select("image"), alone),
                image_teacher.unpacked(),
                "image",
                alone,
            ),
        }
        pair_student = self._reconstruct(batch, pair)
        for name in ("text", "image"):
            students[f"dcl_vl_{name}_loss"] = (pair_student, pair_teacher, name, pair)
        losses = {key: _denoise(batch, *value, label_smoothing) for key, value in students.items()}
        total = (
            itc
            + 0.5 * losses["dcl_text_loss"]
            + losses["dcl_image_loss"]
            + 0.5 * (losses["dcl_vl_text_loss"] + losses["dcl_vl_image_loss"])
        )
        return {
            "loss": total, "itc_loss": itc, **losses, "i2t_ncorrect": i2t, "t2i_ncorrect": t2i,
            "logit_scale_exp": self.logit_scale_exp(),
        }  # fmt: skip

    def audio_language_loss(
        self,
        *,
        text: Tensor,
        audio: Tensor,
        audio_padding: Tensor | None = None,
        masks: Mapping[str, Tensor],
        label_smoothing: float = 0.1,
    ) -> dict[str, Tensor]:
        """Stage 2: audio-text contrast (text without gradient), and denoising of audio and of both together.

        Args:
            text, audio, audio_padding: a pair per row, as in ``encode``.
            masks: bool "audio", "al_audio" [rows, 1 + frames] and "al_text" [rows, 1 + length].
            label_smoothing: of the denoising terms.

        Returns:
            Scalars under upstream's names; "loss" is the total, atc + audio + 0.5 al_text + 0.5 al_audio. Both audio
            terms are held against the pair's teacher pass.

        Raises:
            ValueError: an argument that does not fit, or a mask that hides nothing in the whole batch.
        """
        self._require_decoded({"text", "audio"})
        _require_masks(masks, {"audio", "al_text", "al_audio"})
        _require_pairs("audio", audio, text)
        _require_smoothing(label_smoothing)
        batch, (alone, pair) = read_batch(
            self.encoder_wrapper.adapters, text=text, audio=audio, audio_padding=audio_padding, masks=masks,
            passes=[{"audio": "audio"}, {"text": "al_text", "audio": "al_audio"}],
        )  # fmt: skip
        _require_hidden({"audio": alone, "al_text": pair, "al_audio": pair})
        with torch.no_grad():
            text_embedding = self._project(self._encode(batch.select("text")))
            pair_teacher = self._encode(batch).unpacked()
        audio_embedding = self._project(self._encode(batch.select("audio")))
        atc, a2t, t2a = contrastive_loss(audio_embedding, text_embedding, self.logit_scale_exp())
        pair_student = self._reconstruct(batch, pair)
        audio_student = self._reconstruct(batch.select("audio"), alone)
        losses = {
            "dcl_audio_loss": _denoise(batch, audio_student, pair_teacher, "audio", alone, label_smoothing),
            "dcl_al_text_loss": _denoise(batch, pair_student, pair_teacher, "text", pair, label_smoothing),
            "dcl_al_audio_loss": _denoise(batch, pair_student, pair_teacher, "audio", pair, label_smoothing),
        }
        total = atc + losses["dcl_audio_loss"] + 0.5 * (losses["dcl_al_text_loss"] + losses["dcl_al_audio_loss"])
        return {
            "loss": total, "atc_loss": atc, **losses, "a2t_ncorrect": a2t, "t2a_ncorrect": t2a,
            "logit_scale_exp": self.logit_scale_exp(),
        }  # fmt: skip

    def load_upstream_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load parameters under upstream's names; strict, and nothing is changed unless everything fits.

        Raises:
            ValueError: missing, unexpected or misshaped keys, all of them listed, or a buffer with other values.
        """
        upstream.load(self, state_dict)

    def to_upstream_state_dict(self, grads: bool = False) -> dict[str, Tensor | None]:
        """Parameters, or with ``grads`` their gradients (None where there is none), under upstream's names."""
        return {name: p.grad if grads else p.detach() for name, p in self.named_parameters()}

    def save(self, directory: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` (upstream's names); each file is replaced in one step."""
        upstream.save(self, Path(directory))

    @classmethod
    def load(cls, directory: str | Path, backend: str | None = None) -> OnePeacePretrain:
        """Build the model that ``save`` wrote, on the CPU.

        Raises:
            ValueError: a file that is missing or does not fit.
        """
        return upstream.restore(cls, Path(directory), backend)

    def _require_decoded(self, names: set[str]) -> None:
        for name in sorted(names & set(self.config.encoder.modalities)):
            decoded = name in self.config.decoder.modalities
            require(decoded, f"{name}: got a tensor to reconstruct, takes none: the decoder lacks this modality")

    def logit_scale_exp(self) -> Tensor:
        """exp(s), s clamped in place to [0, ln 100]."""
        with torch.no_grad():
            self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        return self.logit_scale.exp()

    def _encode(self, batch: Batch) -> Encoded:
        stack = self.encoder_wrapper
        return stack(stack.embed(batch), batch.valid.lengths, batch.samples)

    def _project(self, encoded: Encoded) -> Tensor:
        (name,) = encoded.padded if encoded.padded is not None else encoded.plan.modalities
        return F.normalize(self.get_submodule(f"{name}_proj")(encoded.cls(name)), dim=1)

    def _reconstruct(self, batch: Batch, hidden: Hidden) -> dict[str, Tensor]:
        encoder, decoder = self.encoder_wrapper, self.decoder_wrapper
        kept = encoder.embed(batch, hidden.kept)
        lengths = {name: hidden.kept.lengths[name] for name in kept}
        encoded = encoder(kept, lengths, batch.samples)
        if encoded.padded is not None:
            return self._decode_padded(batch, kept, encoded.padded)
        full, lengths = self._decoder_tokens(batch, {name: part.x for name, part in kept.items()})
        plan = decoder.plan(full, lengths, batch.samples)
        names = plan.modalities
        visible = self._per_modality(encoded.packed, encoded.plan.row_counts, "decoder_{}_embed", names)
        tokens = torch.cat([self.get_parameter(f"{name}_mask_token") for name in names])
        x = F.embedding(plan.modality, tokens).to(visible.dtype).index_copy(0, _rows_in(plan, encoded.plan), visible)
        x = x + F.embedding(*_position_index(plan, decoder))
        real = torch.cat([batch.valid.masks[name].flatten() for name in names])[plan.source]
        x = x * real[:, None].to(x.dtype)
        keep = decoder.draw_drop_path(plan.samples, x.device)
        decoded = decoder.encode_packed(x, plan, keep, full)
        return plan.unpack(self._per_modality(decoded.packed, plan.row_counts, "{}_mask_head", names))

    def _decode_padded(
        self, batch: Batch, kept: Mapping[str, PaddedTokens], encoded: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        decoder, embedded = self.decoder_wrapper, {}
        for name, part in kept.items():
            visible = self.get_submodule(f"decoder_{name}_embed")(encoded[name])
            rows, width, dim = visible.shape[0], part.width, visible.shape[2]
            x = self.get_parameter(f"{name}_mask_token").to(visible.dtype).repeat(rows * width, 1)
            real = part.valid.flatten().nonzero().squeeze(1)
            places = (part.ids + torch.arange(rows, device=x.device)[:, None] * width).flatten()[real]
            x[places] = visible.flatten(0, 1)[real]
            x = x.view(rows, width, dim) + decoder.adapter(name).position_table(width)
            if sum(batch.valid.lengths[name]) < rows * width:
                x = x * batch.valid.masks[name][..., None].to(x.dtype)
            embedded[name] = x
        decoded = decoder(*self._decoder_tokens(batch, embedded), batch.samples).unpacked()
        return {name: self.get_submodule(f"{name}_mask_head")(x) for name, x in decoded.items()}

    def _decoder_tokens(
        self, batch: Batch, embedded: Mapping[str, Tensor]
    ) -> tuple[dict[str, PaddedTokens], dict[str, list[int]]]:
        """All positions of the decoder's input, and how many of each row it attends to.

        Upstream masks padding through the bias alone: a decoder without bias attends to its padding, zeroed at first.
        """
        tokens, lengths = {}, {}
        for name, x in embedded.items():
            valid = batch.valid.masks[name]
            lengths[name] = batch.valid.lengths[name]
            if not self.config.decoder.use_bias:
                valid, lengths[name] = torch.ones_like(valid), [valid.shape[1]] * valid.shape[0]
            tokens[name] = PaddedTokens(x, valid, None, valid.shape[1])
        return tokens, lengths

    def _per_modality(self, x: Tensor, row_counts: Sequence[int], pattern: str, names: Sequence[str]) -> Tensor:
        """A linear layer of its own for each modality's rows."""
        parts = x.split(list(row_counts))
        outputs = [self.get_submodule(pattern.format(n))(part) for n, part in zip(names, parts, strict=True)]
        return torch.cat(outputs)


def _require_masks(masks: Mapping[str, Tensor], names: set[str]) -> None:
    got = sorted(masks) if isinstance(masks, Mapping) else describe(masks)
    require(got == sorted(names), f"masks: got {got}, takes exactly one for each of {sorted(names)}")


def _require_pairs(name: str, value: Tensor, text: Tensor) -> None:
    rows = [len(tensor) if isinstance(tensor, Tensor) and tensor.dim() else 0 for tensor in (text, value)]
    require(rows[0] == rows[1], f"text, {name}: got {rows[0]} and {rows[1]} rows, takes a pair in every row")


def _require_smoothing(smoothing: float) -> None:
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


def _starts(values: Sequence[int]) -> list[int]:
    return [sum(values[:i]) for i in range(len(values))]


def _rows_in(full: RoutePlan, kept: RoutePlan) -> Tensor:
    """Row of the full plan that each row of the kept plan belongs to: int64 [kept rows]."""
    device = full.source.device
    row_of = torch.empty(full.padded_rows + 1, dtype=torch.int64, device=device)
    row_of[full.source] = torch.arange(full.capacity, device=device)
    kept_starts = copy_to_device(_starts([r * w for r, w in kept.padded_shapes]), torch.int64, device)
    full_starts = copy_to_device(_starts([r * w for r, w in full.padded_shapes]), torch.int64, device)
    kept_widths = copy_to_device([w for _, w in kept.padded_shapes], torch.int64, device)
    full_widths = copy_to_device([w for _, w in full.padded_shapes], torch.int64, device)
    modality = kept.modality.long()
    row = (kept.source - kept_starts[modality]) // kept_widths[modality]
    return row_of[full_starts[modality] + row * full_widths[modality] + kept.position]


def _position_index(plan: RoutePlan, decoder: Stack) -> tuple[Tensor, Tensor]:
    """Index into, and the concatenation of, the decoder's position tables of the plan's modalities."""
    widths = [width for _, width in plan.padded_shapes]
    tables = [decoder.adapter(n).position_table(w) for n, w in zip(plan.modalities, widths, strict=True)]
    starts = copy_to_device(_starts(widths), torch.int32, plan.source.device)
    return starts[plan.modality.long()] + plan.position, torch.cat(tables)
