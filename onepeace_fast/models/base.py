"""What every model is: an encoder that any set of modalities goes through, and files of its parameters."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from onepeace_fast import hub
from onepeace_fast.backend import check_backend
from onepeace_fast.checks import require
from onepeace_fast.config import MODALITIES, EncoderConfig
from onepeace_fast.layers.adapters import Adapter
from onepeace_fast.layers.parameters import init_linear
from onepeace_fast.layers.plain import inside
from onepeace_fast.models import modalities, upstream
from onepeace_fast.models.fill import fill
from onepeace_fast.models.inputs import read_batch
from onepeace_fast.models.load_report import LoadReport
from onepeace_fast.models.parameter_names import full
from onepeace_fast.models.passes import Encoded
from onepeace_fast.models.stack import Stack

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
MAX_LOGIT_SCALE = math.log(100)


class OnePeaceEncoder(nn.Module):
    """ONE-PEACE's encoder alone (arXiv 2305.11172); parameters carry upstream's names.

    Args:
        config: sizes and variants; the defaults are the public 4 B model's.
        backend: "reference" (padded, as upstream computes it), "fused" (packed), or None: automatic, by device and on a
            CPU by batch.
        adapters: those of the modalities that were added to the configuration, by name.
    """

    tasks: ClassVar[tuple[str, ...]] = ("encode",)
    config_class: ClassVar[type[EncoderConfig]] = EncoderConfig

    def __init__(
        self, config: EncoderConfig, backend: str | None = None, adapters: Mapping[str, Adapter] | None = None
    ) -> None:
        super().__init__()
        if backend is not None:
            check_backend(backend)
        modalities.check_adapters(config.encoder, adapters or {})
        self.config = config
        self.load_report: LoadReport | None = None  # of from_pretrained
        self.encoder_wrapper = Stack(config.encoder, backend, config.vocab_size, adapters)

    @property
    def encoder(self) -> Stack:
        """The encoder, inside whatever was put around ``encoder_wrapper``."""
        return inside(self.encoder_wrapper, Stack)

    def forward(self, task: str, **inputs: Any) -> Any:
        """Call a method by its name, one of ``tasks`` (else ``ValueError``), so that wrappers and hooks see it."""
        require(task in self.tasks, f"task: expected one of {', '.join(self.tasks)}, got {task!r}")
        return getattr(self, task)(**inputs)

    def encode(
        self, *, samples: Mapping[str, Tensor | Sequence[int]] | None = None, **inputs: Tensor | None
    ) -> dict[str, Tensor]:
        """Encode any set of modalities together.

        Args:
            text: int64 [rows, length] token ids without CLS; 1 is padding.
            image: floating point [rows, 3, side, side], side a multiple of 16.
            audio: floating point [rows, samples] at 16 kHz, zero at padding.
            audio_padding: bool [rows, 1 + frames], CLS first, True at padding; None for none.
            samples: {modality: int64 [rows]}, the sample that each row belongs to; by default row i is sample i's.
            inputs: those above, and what the adapters of added modalities take, under their names.

        Returns:
            {modality: [rows, length, embed_dim]}, CLS first; rows at padding mean nothing.

        Raises:
            ValueError: an argument that does not fit, before any work.
        """
        encoder = self.encoder
        batch, _ = read_batch(encoder.adapters, inputs, samples=samples)
        (encoded,) = self.encoder_wrapper([encoder.embed(batch)], batch.samples)
        return encoded.unpacked()

    def load_upstream_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load parameters under upstream's names; strict, and nothing is changed unless everything fits.

        Raises:
            ValueError: missing, unexpected or misshaped keys, all of them listed, or a buffer with other values.
        """
        upstream.load(self, state_dict)

    def to_upstream_state_dict(self, grads: bool = False) -> dict[str, Tensor | None]:
        """Parameters, or with ``grads`` their gradients (None where there is none), under upstream's names.

        Wrappers around layers (torch.compile, checkpoint_wrapper, FSDP) leave no trace in the names. What FSDP2 shards
        are DTensors; of FSDP1, for which every process must call this, they are copies, and gradients are refused.

        Raises:
            ValueError: ``grads`` of a model in FSDP1.
        """
        return upstream.state_dict(self, grads)

    def save(self, directory: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` (upstream's names); each file is replaced in one step.

        Raises:
            ValueError: parameters that ``load`` would refuse, since a part was replaced or parametrized; nothing is
                written.
        """
        adapters = {name: self.encoder.adapter(name) for name in self.config.encoder.added}
        with torch.device("meta"):
            expected = type(self)(self.config, adapters=adapters)
        upstream.save(self, self.config, expected, Path(directory).expanduser())

    def branch(self, *modalities: str) -> OnePeaceEncoder:
        """A smaller model of some modalities, with copies of what they need: for retrieval where this one embeds.

        It has no decoder and no classification head.

        Raises:
            ValueError: no modality, or one that the model does not have.
        """
        known = self.config.encoder.modalities
        require(
            bool(modalities) and set(modalities) <= set(known),
            f"modalities: expected some of {', '.join(known)}, got {', '.join(modalities) or 'none'}",
        )
        kind, encoder = self._branch_kind(), self.config.encoder
        gone: dict[str, Any] = {name: None for name in MODALITIES if name not in modalities}
        added = tuple(name for name in encoder.added if name in modalities)
        adapters = {name: copy.deepcopy(self.encoder.adapter(name)) for name in added}
        encoder = dataclasses.replace(encoder, **gone, added=added)
        with torch.device("meta"):
            config = kind.config_class(encoder=encoder, vocab_size=self.config.vocab_size)
            model = kind(config, self.encoder.backend, adapters)
        values = {name: full(value) for name, value in self.to_upstream_state_dict().items() if value is not None}
        fill(model, values)
        return model.train(self.training)

    def _branch_kind(self) -> type[OnePeaceEncoder]:
        return OnePeaceEncoder

    def push_to_hub(self, name: str, private: bool | None = None) -> str:
        """Save into a repository of the Hugging Face Hub, "owner/name", made where there is none; the commit's address.

        ``private`` is of a new repository; None: as its owner has set. ``onepeace_fast.from_pretrained`` loads it.

        Raises:
            ValueError: what ``save`` refuses, or the Hub; one line.
            ImportError: huggingface_hub, of the extra ``hub``, is missing.
        """
        return hub.upload(name, self.save, private)

    @classmethod
    def load(
        cls, directory: str | Path, backend: str | None = None, adapters: Mapping[str, Adapter] | None = None
    ) -> Self:
        """Build the model that ``save`` wrote, on the CPU, each parameter in the dtype that it has in the file.

        ``adapters`` are those of its added modalities, by name; they take the file's values and dtypes.

        Raises:
            ValueError: a file that is missing or does not fit.
        """
        config, weights = upstream.read_folder(Path(directory).expanduser(), cls.config_class)
        with torch.device("meta"):  # no memory, and no numbers drawn, for what the file replaces
            model = cls(config, backend, adapters)
        upstream.take_over(model, weights)
        return model.to("cpu")


class EmbeddingModel(OnePeaceEncoder):
    """An encoder whose CLS is embedded for retrieval: a projection for each modality, and a temperature."""

    logit_scale: nn.Parameter

    def add_projection(self, modality: str) -> None:
        """Give a modality its projection."""
        dim = self.config.encoder.embed_dim
        self.add_module(f"{modality}_proj", init_linear(nn.Linear(dim, dim)))

    def embed(self, **inputs: Tensor | None) -> Tensor:
        """Embed one modality for retrieval: its CLS, projected and L2-normalised, [rows, embed_dim].

        ``inputs`` are one modality's, as in ``encode``.

        Raises:
            ValueError: none or several modalities, or what ``encode`` refuses.
        """
        encoder = self.encoder
        batch, _ = read_batch(encoder.adapters, inputs)
        names = ", ".join(encoder.adapters)
        require(len(batch.inputs) == 1, f"{names}: expected exactly one, got {sorted(batch.inputs)}")
        (encoded,) = self.encoder_wrapper([encoder.embed(batch)])
        return self.project(encoded)

    def project(self, encoded: Encoded) -> Tensor:
        """The L2-normalised projection of the CLS of a pass of one modality: [rows, embed_dim]."""
        name, cls = encoded.cls()
        return F.normalize(self.get_submodule(f"{name}_proj")(cls), dim=1)

    def logit_scale_exp(self) -> Tensor:
        """exp(s), s clamped in place to [0, ln 100]."""
        with torch.no_grad():
            self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)
        return self.logit_scale.exp()
