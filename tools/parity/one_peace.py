"""ONE-PEACE as OFA-Sys published it: encoder, decoder, both pretraining losses, and every gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from onepeace_fast import OnePeaceConfig, OnePeacePretrain
from tools.parity.recording import Recording
from tools.parity.report import Report

OUTPUT_TOLERANCE, GRADIENT_TOLERANCE, FLOOR = 1e-4, 1e-3, 1e-6
KINDS = {
    "text": ("text",), "image": ("image",), "audio": ("audio",), "vl": ("text", "image"), "al": ("text", "audio"),
}  # fmt: skip
LOSS_MASKS = {"vl": ("text", "image", "vl_text", "vl_image"), "al": ("audio", "al_text", "al_audio")}


class OnePeaceRecording(Recording):
    """One recording: tensors by name, and the configuration they were recorded with."""

    @property
    def config(self) -> OnePeaceConfig:
        """The configuration in the library's own terms."""
        return OnePeaceConfig.from_upstream(self.json("encoder"), self.json("decoder"), int(self.text("vocab")))

    def model(self, backend: str) -> OnePeacePretrain:
        """A model with the recorded parameters, on the recording's device."""
        device = self["input.src_tokens"].device
        model = OnePeacePretrain(self.config, backend=backend).to(device).eval()
        model.load_upstream_state_dict(self.pick("param."))
        return model

    def sources(self, kind: str) -> dict[str, Tensor]:
        """The inputs of one kind of pass, as keyword arguments."""
        every = {"text": self["input.src_tokens"], "image": self["input.src_images"]}
        every["audio"] = self["input.src_audios"]
        chosen = {name: every[name] for name in KINDS[kind]}
        if "audio" in chosen:
            chosen["audio_padding"] = self["input.audio_padding_masks"].bool()
        return chosen

    def hidden(self, kind: str) -> dict[str, Tensor]:
        """The masks of one kind of denoising pass."""
        names = KINDS[kind]
        prefix = f"{kind}_" if len(names) > 1 else ""
        return {name: self[f"input.{prefix}{name}_mask"].bool() for name in names}

    def valid(self, modality: str) -> Tensor | slice:
        """Index of a modality's real tokens."""
        if modality == "image":
            return slice(None)
        if modality == "audio":
            return ~self["input.audio_padding_masks"].bool()
        text = self["input.src_tokens"]
        return torch.cat([torch.ones_like(text[:, :1], dtype=torch.bool), text != 1], dim=1)


def check_state_dict(report: Report, recording: OnePeaceRecording, model: OnePeacePretrain) -> None:
    """Every recorded parameter comes back bit for bit, and no other."""
    values, wanted = model.to_upstream_state_dict(), recording.pick("param.")
    for name in sorted({*values, *wanted}):
        if name not in wanted:
            report.count += 1
            report.failures.append(f"state dict {name}: not in the recording")
        else:
            report.check_bits(f"state dict {name}", values.get(name), wanted[name])


def check_passes(report: Report, recording: OnePeaceRecording, model: OnePeacePretrain) -> None:
    """Encoder outputs, reconstructions and embeddings."""
    for kind, names in KINDS.items():
        sources = recording.sources(kind)
        with torch.no_grad():
            encoded = model.encode(**sources)
            rebuilt = model.reconstruct(**sources, masks=recording.hidden(kind))
            embedding = model.embed(**sources) if len(names) == 1 else None
        for place, name in enumerate(names):
            for what, got, stage in (("encode", encoded, "encoder"), ("reconstruct", rebuilt, "masked")):
                want = recording[f"out.{stage}.{kind}.{place}"]
                report.check(
                    f"{what} {kind}/{name}", got.get(name), want, OUTPUT_TOLERANCE, recording.valid(name), FLOOR
                )
        if embedding is not None:
            report.check(f"embed {kind}", embedding, recording[f"out.logits.{kind}.0"], OUTPUT_TOLERANCE, floor=FLOOR)


def losses(recording: OnePeaceRecording, model: OnePeacePretrain, kind: str) -> dict[str, Tensor]:
    """The losses of a kind of pair, ``vl`` or ``al``, on the recorded inputs."""
    run: Callable[..., dict[str, Tensor]] = {
        "vl": model.vision_language_loss, "al": model.audio_language_loss,
    }[kind]  # fmt: skip
    masks = {name: recording[f"input.{name}_mask"].bool() for name in LOSS_MASKS[kind]}
    return run(**recording.sources(kind), masks=masks, label_smoothing=0.1)


def check_losses(report: Report, recording: OnePeaceRecording, model: OnePeacePretrain, kind: str) -> None:
    """One pretraining task: its losses, and the gradient of their total for every parameter recorded."""
    model.zero_grad(set_to_none=True)
    got = losses(recording, model, kind)
    for name, want in recording.pick(f"loss.{kind}.").items():
        if name.endswith("loss"):
            report.check(f"{kind} {name}", got.get(name), want, OUTPUT_TOLERANCE, floor=FLOOR)
    got["loss"].backward()
    gradients = model.to_upstream_state_dict(grads=True)
    for name, want in recording.pick(f"grad.{kind}.").items():
        gradient = gradients.get(name)
        unused = gradient is None and not want.any()
        report.check(
            f"{kind} gradient of {name}",
            torch.zeros_like(want) if unused else gradient,
            want,
            GRADIENT_TOLERANCE,
            floor=FLOOR,
        )


def check_buffers(report: Report, recording: OnePeaceRecording, model: OnePeacePretrain) -> None:
    """Upstream's index of the bias table for every pair of positions, where it was recorded."""
    for name, want in recording.pick("buffer.").items():
        adapter = model.get_submodule(name.removesuffix(".rp_bucket"))
        report.check_bits(f"buffer {name}", adapter.dense_table_index(want.shape[0]), want)


def checks() -> Iterator[Callable[[Report, OnePeaceRecording, OnePeacePretrain], None]]:
    """Every group of checks."""
    yield check_state_dict
    yield check_buffers
    yield check_passes
    for kind in LOSS_MASKS:
        yield lambda report, recording, model, kind=kind: check_losses(report, recording, model, kind)


def compare(recording: Recording, backend: str) -> Report:
    """Hold a backend to everything in a recording."""
    own = OnePeaceRecording(**vars(recording))
    report, model = Report(), own.model(backend)
    for check in checks():
        check(report, own, model)
    return report
