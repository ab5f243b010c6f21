"""UnIVAL (arXiv 2307.16184): one encoder and decoder for text, images, video and audio.

Upstream's code computes a batch of several modalities wrongly; here a batch mixes them freely, and each sample is what
it would be in a batch of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onepeace_fast.backend import check_backend, resolve_backend
from onepeace_fast.checks import require, require_device, require_tensor
from onepeace_fast.config import is_number
from onepeace_fast.layers.parameters import init_as_bert, with_unread
from onepeace_fast.models import upstream
from onepeace_fast.models.load_report import LoadReport
from onepeace_fast.models.unival import state
from onepeace_fast.models.unival.beam_search import Hypothesis, Settings, Trie, check_settings, search
from onepeace_fast.models.unival.cache import Cached, Uncached
from onepeace_fast.models.unival.config import UnivalConfig
from onepeace_fast.models.unival.decoder import Decoder
from onepeace_fast.models.unival.encoder import Encoded, Encoder
from onepeace_fast.models.unival.inputs import BEGIN, PADDING, read_source, read_target, require_texts, split_raw
from onepeace_fast.models.unival.layout import Packed
from onepeace_fast.models.unival.losses import token_loss
from onepeace_fast.routing import INTEGERS

Samples = Mapping[str, Sequence[int] | Tensor]


class Unival(nn.Module):
    """Encoder and decoder; feature maps of images, videos and audio come in, or with networks these themselves.

    Args:
        config: sizes.
        backend: "reference" (padded, as upstream computes it), "fused" (packed), or None: automatic, by device.
    """

    tasks: ClassVar[tuple[str, ...]] = ("encode", "logits", "loss", "generate")
    load_report: LoadReport | None = None  # of ``from_pretrained``

    def __init__(self, config: UnivalConfig, backend: str | None = None) -> None:
        super().__init__()
        if backend is not None:
            check_backend(backend)
        self.config, self.backend = config, backend
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        with torch.no_grad():
            self.apply(init_as_bert)

    def forward(self, task: str, **inputs: Any) -> Any:
        """Call a method by its name, one of ``tasks`` (else ``ValueError``), so that wrappers and hooks see it."""
        require(task in self.tasks, f"task: expected one of {', '.join(self.tasks)}, got {task!r}")
        return getattr(self, task)(**inputs)

    def encode(
        self, source: Tensor, *, samples: Samples | None = None, patches: Mapping[str, Tensor] | None = None,
        **maps: Tensor | None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The encoder's output.

        Args:
            source: integers [samples, length], token ids; 1 is padding.
            image, audio: floating point [rows, channels, height, width], feature maps; or what the model's networks
                make them of, pixels [rows, 3, height, width] and waveforms [rows, samples] at 48 kHz.
            video: floating point [rows, channels, frames, height, width]; or 3 channels, the pixels of frames.
            samples: {modality: the sample of each row}; by default row i is sample i's.
            patches: {modality: int64 [rows, patches]}, the tokens of a map to take, in this order; by default all.
            maps: those above.

        Returns:
            {modality: [rows, length, embed_dim]}, zero at padding.

        Raises:
            ValueError: an input that does not fit, before any work.
        """
        encoded = self._encode(source, samples, patches, maps)
        return encoded.layout.unpacked(encoded.x)

    def logits(
        self, source: Tensor, previous: Tensor, *, code: Sequence[bool] | Tensor | None = None,
        samples: Samples | None = None, patches: Mapping[str, Tensor] | None = None, **maps: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The scores of the next token behind each one of ``previous``.

        Args:
            source, samples, patches, maps: as in ``encode``.
            previous: integers [samples, length], what each sample has written so far, from its beginning 0 on.
            code: of each sample, whether it writes the codes of an image; None: none does.

        Returns:
            [samples, length, vocab_size], those of a zero vector at padding.

        Raises:
            ValueError: an input that does not fit, before any work.
        """
        require_tensor("source", source, INTEGERS, "[rows, length]", 2)
        tokens = read_target(self.config, "previous", previous, source, code)
        encoded = self._encode(source, samples, patches, maps)
        x, layout = self.decoder(tokens, self.encoder.embed_tokens, encoded, "previous")
        parts = layout.unpacked(x)
        if "code" in parts:
            parts["code"] = parts["code"].roll(1, 1)
        whole = x.new_zeros(*previous.shape, x.shape[-1])
        for name, part in parts.items():
            whole = whole.index_copy(0, torch.tensor(tokens[name].samples, device=x.device), part)
        return F.linear(whole, self.encoder.embed_tokens.weight)

    def loss(
        self, source: Tensor, target: Tensor, *, smoothing: float = 0.0, encouraging: bool = False,
        code: Sequence[bool] | Tensor | None = None, samples: Samples | None = None,
        patches: Mapping[str, Tensor] | None = None, **maps: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The mean loss of the targets' tokens, of whose padding nothing is computed.

        Args:
            source, samples, patches, maps, code: as in ``logits``.
            target: integers [samples, length], what to write, each with its end; 1 is padding, behind it.
            smoothing: of the labels; upstream pretrains with 0 and fine-tunes with 0.1.
            encouraging: whether the bonus of the encouraging loss is added, as upstream fine-tunes.

        Raises:
            ValueError: an input that does not fit, before any work, or a target without a token.
        """
        require_tensor("source", source, INTEGERS, "[rows, length]", 2)
        require_tensor("target", target, INTEGERS, "[samples, length]", 2)
        require_device("target", target, source.device)
        require_texts("target", target != PADDING)  # that of ``previous`` would hide a token behind padding
        fits = is_number(smoothing) and 0 <= smoothing < 1
        require(fits, f"smoothing: expected a number from 0 to below 1, got {smoothing!r}")
        require(isinstance(encouraging, bool), f"encouraging: expected True or False, got {encouraging!r}")
        previous = F.pad(target, (1, 0), value=BEGIN)[:, :-1].masked_fill(target == PADDING, PADDING)
        tokens = read_target(self.config, "target", previous, source, code)
        encoded = self._encode(source, samples, patches, maps)
        x, layout = self.decoder(tokens, self.encoder.embed_tokens, encoded, "target")
        wanted = {"text": target, "code": target.roll(-1, 1)}
        flat = torch.cat([
            layout.real(name, wanted[name][torch.tensor(own.samples, device=x.device)]) for name, own in tokens.items()
        ])  # fmt: skip
        x = layout.rows(x)
        loss = token_loss(F.linear(x, self.encoder.embed_tokens.weight), flat.long(), smoothing, encouraging)
        return with_unread(loss, *self.encoder.unread(encoded), *self.decoder.unread(tokens))

    @torch.no_grad()
    def generate(
        self, source: Tensor, *, beams: int = 5, max_length: int = 20, min_length: int = 2, length_penalty: float = 1.0,
        answers: Trie | None = None, samples: Samples | None = None, patches: Mapping[str, Tensor] | None = None,
        **maps: Tensor | None,
    ) -> list[list[Hypothesis]]:  # fmt: skip
        """Write a text for each sample by beam search.

        The fused backend keeps keys and values of what is written and seen; the reference computes all of it again for
        each token.

        Args:
            source, samples, patches, maps: as in ``encode``.
            beams: how many texts of a sample are kept in work; 1 is the most likely token at each place.
            max_length, min_length: tokens of a text, its end counted; by default no text is empty.
            length_penalty: what a text's length is raised to before its log-probability is divided by it.
            answers: the texts that alone may be written, or None.

        Returns:
            of each sample at most ``beams`` hypotheses, best first.

        Raises:
            ValueError: an input that does not fit, before any work.
        """
        noisy = self.training and self.config.is_noisy
        require(not noisy, "model: expected evaluation mode, got training mode with noise; call its eval()")
        settings = Settings(beams, max_length, min_length, length_penalty, answers)
        check_settings(settings, self.config)
        encoded = self._encode(source, samples, patches, maps)
        kind = Cached if isinstance(encoded.layout, Packed) else Uncached
        step = kind(self.decoder, self.encoder.embed_tokens, encoded, max_length)
        return search(step, source.shape[0], settings, source.device)

    def _encode(
        self, source: Tensor, samples: Samples | None, patches: Mapping[str, Tensor] | None,
        maps: Mapping[str, Tensor | None],
    ) -> Encoded:  # fmt: skip
        maps, raw = split_raw(self.config, maps)
        tokens = read_source(self.config, source, maps, samples, patches)
        packed = resolve_backend(self.backend, source.device) == "fused"
        if self.training and self.config.attention_dropout:
            # The op has no dropout of probabilities.
            require(
                self.backend != "fused",
                "backend: expected None or 'reference' to train with attention_dropout, got 'fused'",
            )
            packed = False
        return self.encoder(tokens, packed, raw, patches or {})

    @classmethod
    def load(cls, directory: str | Path, backend: str | None = None) -> Unival:
        """Build the model of a checkpoint of ``onepeace-fast train``, on the CPU, in training mode.

        Raises:
            ValueError: a file that is missing or does not fit.
        """
        config, weights = upstream.read_folder(Path(directory).expanduser(), UnivalConfig)
        model = cls(config, backend)
        model.load_upstream_state_dict(weights)
        return model

    def load_upstream_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load upstream's state dict; strict, and nothing is changed unless everything fits.

        Raises:
            ValueError: missing, unexpected or misshaped keys, all of them listed, or a buffer with other values.
        """
        state.load(self, state_dict)

    def to_upstream_state_dict(self, grads: bool = False) -> dict[str, Tensor | None]:
        """Parameters, or with ``grads`` their gradients (None where there is none), under upstream's names.

        The token table is there three times, as upstream has it: the encoder's, the decoder's and the output's.
        """
        return state.state_dict(self, grads)
