"""ONE-PEACE for pretraining: encoder, decoder, projections, and the losses of both stages."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from onepeace_fast.checks import require
from onepeace_fast.config import OnePeaceConfig
from onepeace_fast.layers.adapters import Adapter
from onepeace_fast.layers.parameters import init_linear, init_truncated_normal, with_unread
from onepeace_fast.layers.plain import inside, refuse_advancing
from onepeace_fast.models import modalities
from onepeace_fast.models.base import INITIAL_LOGIT_SCALE, EmbeddingModel, OnePeaceEncoder
from onepeace_fast.models.inputs import Batch, Hidden, read_batch
from onepeace_fast.models.losses import contrastive_loss, denoising_loss
from onepeace_fast.models.passes import Encoded, Tokens
from onepeace_fast.models.retrieval import OnePeaceRetrieval
from onepeace_fast.models.stack import Stack


class OnePeacePretrain(EmbeddingModel):
    """ONE-PEACE (arXiv 2305.11172) with both pretraining tasks; parameters carry upstream's names.

    Args:
        config: sizes and variants; the defaults are the public 4 B model's.
        backend: "reference" (padded, as upstream computes it), "fused" (packed), or None: automatic, by device and on a
            CPU by batch.
        adapters: those of the modalities that were added to the configuration, by name.
    """

    tasks = ("encode", "embed", "reconstruct", "vision_language_loss", "audio_language_loss")
    config: OnePeaceConfig
    config_class = OnePeaceConfig

    def __init__(
        self, config: OnePeaceConfig, backend: str | None = None, adapters: Mapping[str, Adapter] | None = None
    ) -> None:
        super().__init__(config, backend, adapters)
        encoder, decoder = config.encoder, config.decoder
        self.decoder_wrapper = Stack(decoder, backend)
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE))
        for name in encoder.modalities:
            self.add_projection(name)
            if name in decoder.modalities:
                self.add_module(f"decoder_{name}_embed", init_linear(nn.Linear(encoder.embed_dim, decoder.embed_dim)))
                token = nn.Parameter(init_truncated_normal(torch.empty(1, decoder.embed_dim)))
                self.register_parameter(f"{name}_mask_token", token)
                self.add_module(f"{name}_mask_head", init_linear(nn.Linear(decoder.embed_dim, encoder.embed_dim)))

    def _branch_kind(self) -> type[OnePeaceEncoder]:
        return OnePeaceRetrieval

    @property
    def decoder(self) -> Stack:
        """The decoder, inside whatever was put around ``decoder_wrapper``."""
        return inside(self.decoder_wrapper, Stack)

    def reconstruct(
        self,
        *,
        masks: Mapping[str, Tensor],
        samples: Mapping[str, Tensor | Sequence[int]] | None = None,
        **inputs: Tensor | None,
    ) -> dict[str, Tensor]:
        """Encode the tokens that ``masks`` leave visible, put them back among mask tokens and decode all.

        ``masks`` is {modality: bool [rows, length]}, CLS first, True where a token is hidden from the encoder; the rest
        is as in ``encode``. Returns {modality: [rows, length, embed_dim]}.

        Raises:
            ValueError: a modality that the decoder lacks, masks of others than the inputs, or what ``encode`` refuses.
        """
        encoder = self.encoder
        given = [name for name in inputs if inputs[name] is not None and not name.endswith("_padding")]
        self._require_decoded(given)
        batch, (hidden,) = read_batch(
            encoder.adapters, inputs, samples=samples, masks=masks, passes=[{name: name for name in given}]
        )
        visible = [encoder.embed(batch, hidden.visible)]
        (rebuilt,) = self._decode([batch], visible, self.encoder_wrapper(visible, batch.samples))
        return rebuilt

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
            Where processes train together, what trains of other modalities gets gradients of zeros from it.

        Raises:
            ValueError: an argument that does not fit, or a mask that hides nothing in the whole batch.
        """
        batch, (alone, pair) = self._read_pairs(
            {"text": text, "image": image}, masks, label_smoothing,
            [{"text": "text", "image": "image"}, {"text": "vl_text", "image": "vl_image"}],
        )  # fmt: skip
        encoder, tokens = self.encoder, self.encoder.tokens(batch)
        texts, images = batch.select("text"), batch.select("image")
        passes = [(texts, alone), (images, alone), (batch, pair)]
        visible = [encoder.embed(one, hidden.visible, tokens) for one, hidden in passes]
        teachers = [encoder.embed(one, None, tokens) for one in (texts, images)]
        text_teacher, image_teacher, *students = self.encoder_wrapper([*teachers, *visible])
        with torch.no_grad():
            (pair_teacher,) = self.encoder_wrapper([encoder.embed(batch, None, tokens)])
        contrast, i2t, t2i = contrastive_loss(
            self.project(image_teacher), self.project(text_teacher), self.logit_scale_exp()
        )
        text_rebuilt, image_rebuilt, pair_rebuilt = self._decode([texts, images, batch], visible, students)
        denoise, together = partial(_denoise, batch, label_smoothing), pair_teacher.unpacked()
        losses = {
            "dcl_text_loss": denoise("text", text_rebuilt, text_teacher.unpacked(), alone),
            "dcl_image_loss": denoise("image", image_rebuilt, image_teacher.unpacked(), alone),
            "dcl_vl_text_loss": denoise("text", pair_rebuilt, together, pair),
            "dcl_vl_image_loss": denoise("image", pair_rebuilt, together, pair),
        }
        total = (
            contrast
            + 0.5 * losses["dcl_text_loss"]
            + losses["dcl_image_loss"]
            + 0.5 * (losses["dcl_vl_text_loss"] + losses["dcl_vl_image_loss"])
        )
        return {
            "loss": self._with_others({"text", "image"}, total), "itc_loss": contrast, **losses, "i2t_ncorrect": i2t,
            "t2i_ncorrect": t2i, "logit_scale_exp": self.logit_scale_exp(),
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
            Where processes train together, what trains of other modalities gets gradients of zeros from it.

        Raises:
            ValueError: an argument that does not fit, or a mask that hides nothing in the whole batch.
        """
        batch, (alone, pair) = self._read_pairs(
            {"text": text, "audio": audio, "audio_padding": audio_padding}, masks, label_smoothing,
            [{"audio": "audio"}, {"text": "al_text", "audio": "al_audio"}],
        )  # fmt: skip
        encoder, tokens = self.encoder, self.encoder.tokens(batch)
        texts, audios = batch.select("text"), batch.select("audio")
        visible = [encoder.embed(one, hidden.visible, tokens) for one, hidden in ((audios, alone), (batch, pair))]
        audio_teacher, *students = self.encoder_wrapper([encoder.embed(audios, None, tokens), *visible])
        # After the passes with gradient: older torch's autocast keeps casts made without one, and gradients were lost.
        with torch.no_grad():
            teachers = [encoder.embed(one, None, tokens) for one in (texts, batch)]
            text_teacher, pair_teacher = self.encoder_wrapper(teachers)
            text_embedding = self.project(text_teacher)
        contrast, a2t, t2a = contrastive_loss(self.project(audio_teacher), text_embedding, self.logit_scale_exp())
        audio_rebuilt, pair_rebuilt = self._decode([audios, batch], visible, students)
        denoise, together = partial(_denoise, batch, label_smoothing), pair_teacher.unpacked()
        losses = {
            "dcl_audio_loss": denoise("audio", audio_rebuilt, together, alone),
            "dcl_al_text_loss": denoise("text", pair_rebuilt, together, pair),
            "dcl_al_audio_loss": denoise("audio", pair_rebuilt, together, pair),
        }
        total = contrast + losses["dcl_audio_loss"] + 0.5 * (losses["dcl_al_text_loss"] + losses["dcl_al_audio_loss"])
        return {
            "loss": self._with_others({"text", "audio"}, total, *self.get_submodule("text_proj").parameters()),
            "atc_loss": contrast, **losses, "a2t_ncorrect": a2t, "t2a_ncorrect": t2a,
            "logit_scale_exp": self.logit_scale_exp(),
        }  # fmt: skip

    def add_modality(self, name: str, adapter: Adapter, init_from: str | None = None) -> None:
        """Give the model one more modality; all others' outputs stay bitwise the same.

        Adds the adapter (with its bias tables), an FFN in every layer, a final LayerNorm and a projection, and renews
        ``config``. ``encode`` and ``embed`` then take its input under its name; the decoder does not learn of it.

        Args:
            name: lower-case letters, digits and underscores.
            adapter: built for this model's ``config.encoder``; see ``onepeace_fast.layers.adapters``.
            init_from: the modality whose FFNs, final norm and projection are copied; None: fresh ones.

        Raises:
            ValueError: a name that is taken, or an adapter that does not fit; nothing is changed.
        """
        self.config = modalities.add_modality(self, self.encoder, self.config, name, adapter, init_from)

    def train_only(self, name: str) -> None:
        """Freeze for stage 2: of the encoder only the adapter, FFNs and final norm of one modality go on training.

        The other modalities' projections are frozen too, so that their embeddings stay bitwise the same; the decoder
        and the rest train. The temperature starts again at 0.07. (ONE-PEACE, section 3.3.)

        Raises:
            ValueError: a modality that the model does not have.
        """
        modalities.train_only(self, self.encoder_wrapper, self.encoder, name)
        self.reset_logit_scale()

    def reset_logit_scale(self) -> None:
        """Set the temperature back to where it starts, 0.07."""
        with torch.no_grad():
            self.logit_scale.fill_(INITIAL_LOGIT_SCALE)

    def _decode(
        self, batches: Sequence[Batch], visible: Sequence[Tokens], encoded: Sequence[Encoded]
    ) -> list[dict[str, Tensor]]:
        """Reconstruct every token of each denoising pass: {modality: [rows, length, embed_dim]}, CLS first.

        ``visible`` are the tokens that the encoder saw in each pass, ``encoded`` what it made of them.
        """
        names = self.config.decoder.modalities
        embeds, heads = (
            {name: self.get_submodule(pattern.format(name)) for name in names}
            for pattern in ("decoder_{}_embed", "{}_mask_head")
        )
        mask_tokens = {name: getattr(self, f"{name}_mask_token") for name in names}
        passes = [
            self.decoder.among_mask_tokens(mask_tokens, batch, seen, one.through(embeds))
            for batch, seen, one in zip(batches, visible, encoded, strict=True)
        ]
        return [one.through(heads).unpacked() for one in self.decoder_wrapper(passes, batches[0].samples)]

    def _read_pairs(
        self, inputs: Mapping[str, Tensor | None], masks: Mapping[str, Tensor], label_smoothing: float,
        passes: Sequence[Mapping[str, str]],
    ) -> tuple[Batch, list[Hidden]]:  # fmt: skip
        """Check a pretraining task's arguments and read them; the last of ``passes`` has both modalities."""
        first, other = passes[-1]
        self._require_decoded((first, other))
        rows = [len(x) if isinstance(x, Tensor) and x.dim() else 0 for x in (inputs[first], inputs[other])]
        require(rows[0] == rows[1], f"{first}, {other}: expected a pair in every row, got {rows[0]} and {rows[1]} rows")
        smooth = 0.0 <= label_smoothing < 1.0
        require(smooth, f"label_smoothing: expected a probability in [0, 1), got {label_smoothing}")
        if self.training and self.encoder.resolved_backend == "fused":
            refuse_advancing(self)
        batch, hidden = read_batch(self.encoder.adapters, inputs, masks=masks, passes=passes)
        for one, found in zip(passes, hidden, strict=True):
            for modality, name in one.items():
                require(
                    found.counts[modality] > 0,
                    f"masks[{name!r}]: expected at least one hidden token in the whole batch, got none",
                )
        return batch, hidden

    def _require_decoded(self, names: Collection[str]) -> None:
        for name in sorted(names):
            decoded = name in self.config.decoder.modalities or name not in self.config.encoder.modalities
            require(decoded, f"{name}: expected no tensor to reconstruct, got one: the decoder lacks this modality")

    def _with_others(self, read: set[str], total: Tensor, *unread: nn.Parameter) -> Tensor:
        """The total; ``unread`` and, where processes train together, other modalities get zeros as gradients."""
        # Elsewhere the others get none: an optimizer's weight decay wears away what has a gradient of zeros.
        together = dist.is_available() and dist.is_initialized()
        others = modalities.parameters_of(self, set(self.config.encoder.modalities) - read) if together else ()
        return with_unread(total, *others, *unread)


def _denoise(
    batch: Batch, smoothing: float, modality: str, rebuilt: Mapping[str, Tensor], teacher: Mapping[str, Tensor],
    hidden: Hidden,
) -> Tensor:  # fmt: skip
    """The loss of one modality's hidden tokens in one pass: what was rebuilt of them against the teacher's features."""
    valid, lengths = batch.valid.masks[modality], batch.valid.lengths[modality]
    real = sum(lengths) - len(lengths)
    student, mask, count = rebuilt[modality], hidden.masks[modality], hidden.counts[modality]
    return denoising_loss(student, teacher[modality], valid, real, mask, count, smoothing)
