"""Recorded upstream tensors, and every check that a model is held to against them."""

from __future__ import annotations

import dataclasses
import json
import lzma
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor

from onepeace_fast import OnePeaceConfig, OnePeacePretrain

FOLDER = Path(__file__).resolve().parent.parent / "goldens"
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3
KINDS = {
    "text": ("text",), "image": ("image",), "audio": ("audio",), "vl": ("text", "image"), "al": ("text", "audio"),
}  # fmt: skip
LOSS_MASKS = {"vl": ("text", "image", "vl_text", "vl_image"), "al": ("audio", "al_text", "al_audio")}


@dataclass(frozen=True)
class Golden:
    """One recording: tensors by name, and the configuration they were recorded with."""

    tensors: dict[str, Tensor]
    encoder: dict
    decoder: dict
    vocab_size: int

    def pick(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names start with ``prefix``, without it."""
        return {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}

    def to(self, device: str) -> Golden:
        """The same recording on another device."""
        return dataclasses.replace(self, tensors={name: value.to(device) for name, value in self.tensors.items()})

    @property
    def config(self) -> OnePeaceConfig:
        """The configuration in the library's own terms."""
        return OnePeaceConfig.from_upstream(self.encoder, self.decoder, self.vocab_size)

    def model(self, backend: str) -> OnePeacePretrain:
        """A model with the recorded parameters, on the recording's device."""
        device = self.tensors["input.src_tokens"].device
        model = OnePeacePretrain(self.config, backend=backend).to(device).eval()
        model.load_upstream_state_dict(self.pick("param."))
        return model

    def sources(self, kind: str) -> dict[str, Tensor]:
        """The inputs of one kind of pass, as keyword arguments."""
        every = {"text": self.tensors["input.src_tokens"], "image": self.tensors["input.src_images"]}
        every["audio"] = self.tensors["input.src_audios"]
        chosen = {name: every[name] for name in KINDS[kind]}
        if "audio" in chosen:
            chosen["audio_padding"] = self.tensors["input.audio_padding_masks"].bool()
        return chosen

    def hidden(self, kind: str) -> dict[str, Tensor]:
        """The masks of one kind of denoising pass."""
        names = KINDS[kind]
        prefix = f"{kind}_" if len(names) > 1 else ""
        return {name: self.tensors[f"input.{prefix}{name}_mask"].bool() for name in names}

    def valid(self, modality: str) -> Tensor | slice:
        """Index of a modality's real tokens."""
        if modality == "image":
            return slice(None)
        if modality == "audio":
            return ~self.tensors["input.audio_padding_masks"].bool()
        text = self.tensors["input.src_tokens"]
        return torch.cat([torch.ones_like(text[:, :1], dtype=torch.bool), text != 1], dim=1)


@cache
def golden(name: str) -> Golden:
    """Read a recording: ``tiny``, ``flags`` or ``perlayer``; gradients come back as float32. Do not write into it."""
    raw = lzma.decompress((FOLDER / f"onepeace_{name}.safetensors.xz").read_bytes())
    tensors = load(raw)
    for key in [key for key in tensors if key.startswith("scale.")]:
        scale = tensors.pop(key)
        gradient = key.removeprefix("scale.")
        tensors[gradient] = tensors[gradient] * scale
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    return Golden(tensors, json.loads(header["encoder"]), json.loads(header["decoder"]), int(header["vocab"]))


@dataclass
class Report:
    """How many checks ran, and a line for each that failed."""

    count: int = 0
    failures: list[str] = field(default_factory=list)

    def check(
        self, name: str, got: Tensor | None, want: Tensor, tolerance: float, rows: Tensor | slice = slice(None)
    ) -> None:
        """Compare to within ``tolerance`` of the wanted tensor's largest magnitude."""
        self.count += 1
        if got is None:
            self.failures.append(f"{name}: no value")
            return
        got, want = got.detach().float(), want.float()
        if got.shape != want.shape:
            self.failures.append(f"{name}: shape {list(got.shape)} instead of {list(want.shape)}")
            return
        if want.dim():
            got, want = got[rows], want[rows]
        error, scale = (got - want).abs().max().item(), want.abs().max().item()
        if not error <= tolerance * scale + 1e-6:  # a NaN fails too
            self.failures.append(f"{name}: off by {error:.3e} where the largest magnitude is {scale:.3e}")

    def check_bits(self, name: str, got: Tensor | None, want: Tensor) -> None:
        """Compare exactly; NaN equals NaN."""
        self.count += 1
        if got is None or got.shape != want.shape or not torch.equal(got.isnan(), want.isnan()):
            self.failures.append(f"{name}: lost, misshaped or NaN elsewhere")
        elif not torch.equal(got.nan_to_num(), want.nan_to_num()):
            self.failures.append(f"{name}: changed")


def check_state_dict(report: Report, recording: Golden, model: OnePeacePretrain) -> None:
    """Every recorded parameter comes back bit for bit, and no other."""
    values, wanted = model.to_upstream_state_dict(), recording.pick("param.")
    for name in sorted({*values, *wanted}):
        if name not in wanted:
            report.failures.append(f"state dict {name}: not in the recording")
        else:
            report.check_bits(f"state dict {name}", values.get(name), wanted[name])


def check_passes(report: Report, recording: Golden, model: OnePeacePretrain) -> None:
    """Encoder outputs, reconstructions and embeddings."""
    for kind, names in KINDS.items():
        sources = recording.sources(kind)
        with torch.no_grad():
            encoded = model.encode(**sources)
            rebuilt = model.reconstruct(**sources, masks=recording.hidden(kind))
            embedding = model.embed(**sources) if len(names) == 1 else None
        for place, name in enumerate(names):
            for what, got, stage in (("encode", encoded, "encoder"), ("reconstruct", rebuilt, "masked")):
                want = recording.tensors[f"out.{stage}.{kind}.{place}"]
                report.check(f"{what} {kind}/{name}", got.get(name), want, OUTPUT_TOLERANCE, recording.valid(name))
        if embedding is not None:
            report.check(f"embed {kind}", embedding, recording.tensors[f"out.logits.{kind}.0"], OUTPUT_TOLERANCE)


def losses(recording: Golden, model: OnePeacePretrain, kind: str) -> dict[str, Tensor]:
    """The losses of a kind of pair, ``vl`` or ``al``, on the recorded inputs."""
    run: Callable[..., dict[str, Tensor]] = {
        "vl": model.vision_language_loss, "al": model.audio_language_loss,
    }[kind]  # fmt: skip
    masks = {name: recording.tensors[f"input.{name}_mask"].bool() for name in LOSS_MASKS[kind]}
    return run(**recording.sources(kind), masks=masks, label_smoothing=0.1)


def check_losses(report: Report, recording: Golden, model: OnePeacePretrain, kind: str) -> None:
    """One pretraining task: its losses, and the gradient of their total for every parameter recorded."""
    model.zero_grad(set_to_none=True)
    got = losses(recording, model, kind)
    for name, want in recording.pick(f"loss.{kind}.").items():
        if name.endswith("loss"):
            report.check(f"{kind} {name}", got.get(name), want, OUTPUT_TOLERANCE)
    got["loss"].backward()
    gradients = model.to_upstream_state_dict(grads=True)
    for name, want in recording.pick(f"grad.{kind}.").items():
        gradient = gradients.get(name)
        unused = gradient is None and not want.any()
        report.check(
            f"{kind} gradient of {name}", torch.zeros_like(want) if unused else gradient, want, GRADIENT_TOLERANCE
        )


def check_buffers(report: Report, recording: Golden, model: OnePeacePretrain) -> None:
    """Upstream's index of the bias table for every pair of positions, where it was recorded."""
    for name, want in recording.pick("buffer.").items():
        adapter = model.get_submodule(name.removesuffix(".rp_bucket"))
        report.check_bits(f"buffer {name}", adapter.dense_table_index(want.shape[0]), want)


def checks() -> Iterator[Callable[[Report, Golden, OnePeacePretrain], None]]:
    """Every group of checks."""
    yield check_state_dict
    yield check_buffers
    yield check_passes
    for kind in LOSS_MASKS:
        yield lambda report, recording, model, kind=kind: check_losses(report, recording, model, kind)


def compare(recording: Golden, backend: str) -> Report:
    """Hold a backend to everything in a recording."""
    report, model = Report(), recording.model(backend)
    for check in checks():
        check(report, recording, model)
    return report
