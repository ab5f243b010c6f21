"""MiCo as invictus717 published it: EVA's encoder, the context and its heads, and every gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from onepeace_fast.attention_structures import equal_segments
from onepeace_fast.models.mico import Context, ContextConfig, EvaConfig, EvaEncoder
from onepeace_fast.models.mico.context import Tokens, pooled
from onepeace_fast.models.mico.inputs import read_frames
from tools.parity.recording import Recording, RecordingError
from tools.parity.report import OUTPUT_TOLERANCE, PROJECTIONS, Report

LETTERS = {"vision": "v", "audio": "a", "depth": "d", "subtitle": "s", "text": "t"}


def compare(recording: Recording, backend: str) -> Report:
    """Every tensor of an encoder's recording, or of the context's."""
    config = recording.json("config")
    if "vision_cfg" in config:
        return compare_encoder(recording, config, backend)
    if "multimodal_dim" in config:
        return compare_context(recording, config, backend)
    raise RecordingError(f"expected the configuration of an encoder or a context, got {', '.join(sorted(config))}")


def compare_encoder(recording: Recording, config: Mapping[str, Any], backend: str) -> Report:
    """Angles, states behind each block, features of frames and spectrograms, and all gradients."""
    report, device = Report(), recording["input.vision_pixels"].device
    sizes = EvaConfig.from_upstream(config["vision_cfg"], config["embed_dim"])
    model = EvaEncoder(sizes, backend).to(device).eval()
    model.load_upstream_state_dict(recording.pick("param."))
    for name, want in recording.pick("buffer.").items():
        report.check(name, model.carried().get(name), want.cpu(), OUTPUT_TOLERANCE)
    states: list[Tensor] = []
    handles = [block.register_forward_hook(lambda *given: states.append(given[2])) for block in model.blocks]
    pixels = recording["input.vision_pixels"].clone().requires_grad_()
    features = model(pixels)
    for handle in handles:
        handle.remove()
    rows = features.flatten(0, 1)
    for name in recorded(recording, "mid.block"):
        state = states[int(name.removeprefix("mid.block"))].view(rows.shape)
        report.check_gradient(recording, name, state, OUTPUT_TOLERANCE)
    head = model.clip_features(rows)
    counts = [pixels.shape[1]] * pixels.shape[0]
    found = {"vision_features": features, "head": head, "pool_vision_for_contra": pooled(rows, counts)}
    with torch.no_grad():
        if "input.audio_spectrograms" in recording.tensors:
            given = recording["input.audio_spectrograms"]
            frames = read_frames("audio", given, sizes, [*range(len(given))]).values
            found["audio_features"] = model(frames.unflatten(0, given.shape[:2]))
        if "input.eps_probe" in recording.tensors:
            found["eps_probe.block0"] = probe(model, recording["input.eps_probe"], backend)
    check_outputs(report, recording, found)
    terms = [rows * recording["input.loss_weight_features"], head * recording["input.loss_weight_head"]]
    check_backward(report, recording, terms, model.to_upstream_state_dict, {"vision_pixels": pixels})
    return report


def probe(model: EvaEncoder, x: Tensor, backend: str) -> Tensor:
    """What the first block makes of tokens so small that a wrong epsilon shows."""
    rope = (model.rope_cos, model.rope_sin) if model.config.rope else None
    block = model.blocks[0]
    if backend == "reference":
        return block(x, rope, None)
    return block(x.flatten(0, 1), rope, equal_segments(len(x), x.new_zeros(x.shape[1], dtype=torch.int32))).view(
        x.shape
    )


def check_outputs(report: Report, recording: Recording, found: Mapping[str, Tensor]) -> None:
    """All that is recorded under "out."; what is not found has no value."""
    for name in recorded(recording, "out."):
        report.check_gradient(recording, name, found.get(name.removeprefix("out.")), OUTPUT_TOLERANCE)


def recorded(recording: Recording, *prefixes: str) -> list[str]:
    """What is recorded under these names, whole or by its projections."""
    names = {name.partition(".")[2] if name.split(".")[0] in PROJECTIONS else name for name in recording.tensors}
    return sorted(name for name in names if name.startswith(prefixes))


def check_backward(
    report: Report, recording: Recording, terms: Sequence[Tensor], state_dict: Any, inputs: Mapping[str, Tensor]
) -> None:
    """The loss, which is the sum of all terms, and the gradients of it in parameters and inputs."""
    total = torch.stack([term.sum() for term in terms]).sum()
    if "loss.total" in recording.tensors:
        # Terms of both signs cancel: what they are off by is small beside them, not beside the loss.
        size = torch.stack([term.detach().norm() for term in terms]).norm().item()
        report.check("loss.total", total, recording["loss.total"], 0, floor=OUTPUT_TOLERANCE * size)
    total.backward()
    gradients = state_dict(grads=True)
    for name in recorded(recording, "dinput.", "grad."):
        kind, _, own = name.partition(".")
        got = inputs[own].grad if kind == "dinput" and own in inputs else gradients.get(own)
        report.check_gradient(recording, name, got)


def compare_context(recording: Recording, config: Mapping[str, Any], backend: str) -> Report:
    """Contexts of each modality in each number of frames, features, the match head and all gradients."""
    report, packed = Report(), backend == "fused"
    names = [name.removeprefix("max_").removesuffix("_sample_num") for name in config if name.startswith("max_")]
    frames = {name: config[f"max_{name}_sample_num"] for name in names}
    sizes = ContextConfig(
        vision_dim=config["vision_dim"], width=config["multimodal_dim"], contra_dim=config["contra_dim"], frames=frames
    )
    model = Context(sizes).to(recording["input.subtitle"].device)
    model.load_upstream_state_dict(recording.pick("param."))
    given = {name: x for name, x in recording.pick("input.").items() if not name.startswith(("w_", "wf_"))}
    given = {name: x.clone().requires_grad_() for name, x in given.items()}
    found: dict[str, Tensor] = {}
    for name, x in given.items():
        modality = name.rstrip("0123456789")
        found[f"context.{name}"] = context(model, modality, x, packed)
        if f"out.context_pooled.{name}" in recorded(recording, "out."):
            found[f"context_pooled.{name}"] = context(model, modality, x, packed, pool=True)
        if modality in frames and x.shape[1] == frames[modality]:
            found[f"feat_{LETTERS[modality]}"] = model.feature(modality, pooled(x.flatten(0, 1), [x.shape[1]] * len(x)))
    first = given["subtitle"][:, 0]
    found |= {f"feat_{LETTERS[name]}": model.feature(name, first) for name in ("subtitle", "text")}
    found["itm_head"] = model.itm_head(first, packed)
    check_outputs(report, recording, found)
    terms = []
    for name, weight in recording.pick("input.w_").items():
        kind = "context_pooled." if name.startswith("pooled_") else "context."
        terms.append(found[kind + name.removeprefix("pooled_")] * weight)
    for name, weight in recording.pick("input.wf_").items():
        terms.append(found["itm_head" if name == "itm" else f"feat_{name}"] * weight)
    check_backward(report, recording, terms, model.to_upstream_state_dict, given)
    return report


def context(model: Context, modality: str, x: Tensor, packed: bool, pool: bool = False) -> Tensor:
    """[rows, tokens, width] of recorded tokens, whose rows are as long as each other."""
    rows, *_ = x.shape
    tokens = Tokens(x.flatten(0, 1), [x.shape[1]] * rows, range(rows))
    return model.context({modality: tokens}, packed, pool).x.unflatten(0, (rows, -1))
