"""UnIVAL as mshukor published it: buckets, both stacks with their biases and states, losses, and every gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from onepeace_fast import RelativeBias
from onepeace_fast.models.unival import Unival, UnivalConfig
from onepeace_fast.models.unival.inputs import PADDING, code_tokens
from onepeace_fast.models.unival.layers import PaddedRoute, Route
from onepeace_fast.models.unival.layout import Packed
from onepeace_fast.models.unival.losses import token_loss
from onepeace_fast.models.unival.stack import Layout
from onepeace_fast.models.unival.state import buffer
from onepeace_fast.relative_position import dense_index
from tools.parity.recording import Recording, RecordingError
from tools.parity.report import OUTPUT_TOLERANCE, PROJECTIONS, Report

LOSSES: Mapping[str, Mapping[str, Any]] = {
    "ce0": {}, "ce0.1": {"smoothing": 0.1}, "el0.1": {"smoothing": 0.1, "encouraging": True}
}  # fmt: skip
CASES = ("text", "image", "image_sampled", "video", "audio", "code")
# A bias of all keys changes no softmax: these gradients are zero but for rounding.
WITHOUT_EFFECT = ("k_proj.bias", "pos_k_linear.bias")
ZERO = 1e-7


class Case(NamedTuple):
    """What one recorded pass is given."""

    source: Tensor
    previous: Tensor
    target: Tensor
    arguments: dict[str, Any]  # of the model's methods beside these
    code: dict[str, Any]
    features: dict[str, Tensor]  # leaves with a gradient, by the inputs' names


class Seen(NamedTuple):
    """What one pass went through: of each stack its layout, states and routes, and the encoder's places."""

    layouts: dict[str, Layout]
    states: dict[str, list[Tensor]]
    routes: dict[str, list[list[Route]]]
    places: list[Tensor]


def compare(recording: Recording, backend: str) -> Report:
    """Every tensor of the cases that the recording has."""
    report = Report()
    config = config_of(recording)
    for name, want in recording.pick("buffer.").items():
        report.check_bits(name, buckets(name, want, config, backend), want)
    names = {name.split(".")[i] for name in recording.tensors for i in _case_place(name)}
    if unknown := sorted(names - {*CASES}):
        raise RecordingError(f"expected the cases {', '.join(CASES)}, got {', '.join(unknown)}")
    if not names:
        return report
    model = Unival(config, backend).to(recording["input.src_tokens"].device).eval()
    model.load_upstream_state_dict(recording.pick("param."))
    for case in CASES:
        if case in names:
            check_case(report, recording, model, case)
    return report


def config_of(recording: Recording) -> UnivalConfig:
    """Upstream's arguments, or of a recording of its buckets alone the sizes of these."""
    config = recording.json("config")
    if "args" in recording.metadata:
        return UnivalConfig.from_upstream(recording.json("args"), config["vocab"], config.get("feat_channels", 2048))
    names = ("token_bucket_size", "image_bucket_size")
    return UnivalConfig(vocab_size=4, code_image_size=8, **{name: config[name] for name in names})


def _case_place(name: str) -> tuple[int, ...]:
    """Where a name has its case, behind what ``projections`` put before it."""
    parts = name.split(".")
    first = int(parts[0] in PROJECTIONS)
    return (first + 1,) if parts[first] in ("out", "mid", "loss", "dinput", "dlogits", "grad") else ()


def buckets(name: str, want: Tensor, config: UnivalConfig, backend: str) -> Tensor:
    """A recorded table: upstream's buffers of a state dict, or what the packed tokens have in their place."""
    length, side, fused = want.shape[0], config.image_bucket_size, backend == "fused"
    if name.startswith("decoder_image_position_idx"):
        if not fused:
            found = buffer(config, "decoder.image_position_idx")
            assert found is not None
            return found[:length].to(want.device)
        ids = torch.zeros(1, length, dtype=torch.int64, device=want.device)
        return code_tokens(ids, [0], config).table_rows
    if name == "image_rp_bucket":
        found = rows_of(RelativeBias.one_peace(1, grid=side), length) if fused else buffer(
            config, "encoder.image_rp_bucket"
        )  # fmt: skip
        assert found is not None
        return found.to(want.device)
    stem, _, direction = name.rpartition("_")
    size = int(stem.rpartition("_S")[2]) if "_S" in stem else config.token_bucket_size
    if fused:
        found = rows_of(RelativeBias.one_peace(1, buckets=size, with_cls=False), length)
    else:
        found = buffer(UnivalConfig(vocab_size=4, token_bucket_size=size), "encoder.token_rp_bucket")
    assert found is not None
    return (found[:, 0] if direction == "col0" else found[0]).to(want.device)


def rows_of(bias: RelativeBias, length: int) -> Tensor:
    """The table's row of every pair of positions."""
    with torch.no_grad():
        assert bias.table is not None
        bias.table.copy_(torch.arange(bias.table.shape[0])[:, None])
        return bias.dense(length)[0].long()


def case_of(recording: Recording, case: str) -> Case:
    """The inputs of a case; an image that upstream's patch_masks leave out is not given."""
    code = {"code": recording["input.code_masks"].bool()} if case == "code" else {}
    prefix = "code_" if case == "code" else ""
    arguments: dict[str, Any] = {}
    features: dict[str, Tensor] = {}
    kind = case.removesuffix("_sampled")
    if kind in ("image", "video", "audio"):
        features[f"{kind}_feats"] = given = recording[f"input.{kind}_feats"].clone().requires_grad_()
        arguments[kind] = given
    if kind == "image":
        there = recording["input.patch_masks"].bool()
        arguments |= {"image": given[there], "samples": {"image": there.nonzero().flatten().tolist()}}
        if case == "image_sampled":
            arguments["patches"] = {"image": recording["input.image_sample_order"][there]}
    previous, target = (recording[f"input.{prefix}{name}"] for name in ("prev_output_tokens", "target"))
    return Case(recording["input.src_tokens"], previous, target, arguments, code, features)


def check_case(report: Report, recording: Recording, model: Unival, case: str) -> None:
    """Outputs, states, biases, losses and gradients of one case, as far as they are recorded."""
    given = case_of(recording, case)
    with torch.no_grad():
        (encoded, logits), seen = watched(model, lambda: (
            model.encode(given.source, **given.arguments),
            model.logits(given.source, given.previous, **given.code, **given.arguments),
        ))  # fmt: skip
    check_outputs(report, recording, case, given, encoded, logits)
    check_states(report, recording, case, given, seen)
    real = given.target != PADDING
    check_dlogits(report, recording, case, logits, given.target, real)
    count = int(real.sum())
    if f"loss.{case}.ntokens" in recording.tensors:
        report.check_bits(f"{case} tokens", torch.tensor(float(count)), recording[f"loss.{case}.ntokens"].cpu())
    for name, settings in LOSSES.items():
        wanted = [key for key in (f"loss.{case}.{name}.sum", f"loss.{case}.{name}.nll_sum") if key in recording.tensors]
        if wanted:
            with torch.no_grad():
                loss = model.loss(given.source, given.target, **settings, **given.code, **given.arguments) * count
            for key in wanted:
                report.check(key, loss, recording[key], OUTPUT_TOLERANCE)
    check_gradients(report, recording, model, case, given)


def check_outputs(
    report: Report, recording: Recording, case: str, given: Case, encoded: Mapping[str, Tensor], logits: Tensor
) -> None:
    """The encoder's output and which of it is padding, and the logits at real tokens."""
    padding, name = [], f"out.{case}.encoder_out"
    for modality, x in encoded.items():
        if modality == "text":
            padding.append(given.source == PADDING)
            continue
        there = given.arguments.get("samples", {}).get(modality, range(len(given.source)))
        absent = torch.ones(len(given.source), x.shape[1], dtype=torch.bool, device=x.device)
        absent[[*there]] = False
        padding.append(absent)
    hidden = torch.cat(padding, 1)
    if f"out.{case}.encoder_padding_mask" in recording.tensors:
        want = recording[f"out.{case}.encoder_padding_mask"]
        report.check_bits(f"{case} padding", hidden.to(want.dtype), want)
    if name in recording.tensors:
        blocks = []
        for mask, x in zip(padding, encoded.values(), strict=True):
            block = x.new_zeros(*mask.shape, x.shape[-1])
            block[~mask.all(1)] = x
            blocks.append(block)
        report.check(name, torch.cat(blocks, 1), recording[name], OUTPUT_TOLERANCE, ~hidden)
    if f"out.{case}.logits" in recording.tensors:
        real = given.previous != PADDING
        report.check(f"{case} logits", logits, recording[f"out.{case}.logits"], OUTPUT_TOLERANCE, real)


def watched(model: Unival, run: Callable[[], Any]) -> tuple[Any, Seen]:
    """What a function returns, and what the model's layers were given and gave in its last pass."""
    seen = Seen({}, {"encoder": [], "decoder": []}, {"encoder": [], "decoder": []}, [])

    def stack_starts(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            seen.states[name].clear()
            seen.routes[name].clear()

        return hook

    def layer_called(name: str) -> Callable[..., None]:
        def hook(_: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
            if not seen.states[name]:
                seen.states[name].append(arguments[0])
            seen.states[name].append(output)
            seen.routes[name].append([x for x in arguments if not isinstance(x, Tensor)])

        return hook

    def encoder_ends(_: Any, arguments: Any, output: Any) -> None:
        seen.layouts["encoder"] = output.layout
        seen.places[:] = [output.places]

    def decoder_ends(_: Any, arguments: Any, output: Any) -> None:
        seen.layouts["decoder"] = output[1]

    handles = []
    for name, stack, ends in (("encoder", model.encoder, encoder_ends), ("decoder", model.decoder, decoder_ends)):
        handles += [stack.register_forward_pre_hook(stack_starts(name)), stack.register_forward_hook(ends)]
        handles += [layer.register_forward_hook(layer_called(name)) for layer in stack.layers]
    try:
        return run(), seen
    finally:
        for handle in handles:
            handle.remove()


def check_states(report: Report, recording: Recording, case: str, given: Case, seen: Seen) -> None:
    """States between layers, positions and attention biases."""
    for name, want in recording.pick(f"mid.{case}.").items():
        stack, *rest = name.split(".")
        if name == "position_embeddings0":
            positions = seen.places[0][rows_in_sample(seen.layouts["encoder"], 0)[1]]
            report.check(f"{case} positions", positions, want, OUTPUT_TOLERANCE)
        elif stack in ("encoder_state", "decoder_state"):
            stack = stack.removesuffix("_state")
            parts = seen.layouts[stack].unpacked(seen.states[stack][int(rest[0])])
            got, hidden = blocks_side_by_side(parts, seen.layouts[stack], want)
            report.check(f"{case} {name}", got, want, OUTPUT_TOLERANCE, ~hidden)
        else:
            route = seen.routes[stack][int(rest[1])][rest[2] == "cross_attn_bias"]
            keys = seen.layouts["encoder"] if rest[2] == "cross_attn_bias" else seen.layouts[stack]
            several = want if want.dim() == 4 else want[None]
            for sample, bias in enumerate(several):
                got, sees = dense_bias(route, seen.layouts[stack], keys, sample)
                length = [*got.shape[1:]]
                bias = bias[:, : length[0], : length[1]]
                report.check(f"{case} {name} of sample {sample}", got[:, sees], bias[:, sees], OUTPUT_TOLERANCE)


def rows_in_sample(layout: Layout, sample: int) -> tuple[Tensor, Tensor]:
    """A sample's rows of a packed layout, or columns of a padded one, by place, and the place of each row."""
    if isinstance(layout, Packed):
        rows = (layout.plan.sample == sample).nonzero().flatten()
        place = layout.place[rows]
    else:
        rows = layout.valid[sample].nonzero().flatten()
        place = layout.place[sample, rows]
    if "code" in layout.tokens:
        rows, place = rows[place.argsort()], place.sort().values
    return rows, place


def blocks_side_by_side(parts: Mapping[str, Tensor], layout: Layout, want: Tensor) -> tuple[Tensor, Tensor]:
    """[samples, length, width] as upstream has it, and which of it is padding."""
    got, hidden = torch.zeros_like(want), torch.ones(want.shape[:2], dtype=torch.bool, device=want.device)
    start = 0
    for name, x in parts.items():
        own = layout.tokens[name]
        got[own.samples, start : start + x.shape[1]] = x
        hidden[own.samples, start : start + x.shape[1]] = ~own.valid
        start += x.shape[1]
    return got, hidden


def dense_bias(route: Route, layout: Layout, keys: Layout, sample: int) -> tuple[Tensor, Tensor]:
    """What is added to a sample's scores, [heads, queries, keys], and which pairs see each other."""
    (rows, _), (key_rows, _) = rows_in_sample(layout, sample), rows_in_sample(keys, sample)
    if isinstance(route, PaddedRoute):
        bias = route.bias[sample][:, rows][:, :, key_rows]
        return bias, bias[0].isfinite()
    q, k = route.query_places[rows].transpose(0, 1), route.key_places[key_rows].transpose(0, 1)
    bias, own = (2 * q.shape[-1]) ** -0.5 * (q @ k.transpose(-1, -2)), route.segments
    if route.vectors:
        modality = own.modality[rows]
        for m, (vector, offset) in enumerate(zip(route.vectors, route.code_offsets, strict=True)):
            index = dense_index(own.code[rows], own.is_cls[rows], offset, vector.shape[1])
            pairs = (modality == m)[:, None] & (modality == m)
            bias = bias + torch.where(pairs, vector[:, index.clamp(0, vector.shape[1] - 1)], 0)
    sees = torch.ones(bias.shape[1:], dtype=torch.bool, device=bias.device)
    if own.order is not None:
        sees = own.order[rows][:, None] >= own.order[key_rows]
    return bias, sees


def check_dlogits(
    report: Report, recording: Recording, case: str, logits: Tensor, target: Tensor, real: Tensor
) -> None:
    """The losses' gradients in the logits."""
    for name, settings in LOSSES.items():
        if f"dlogits.{case}.{name}" in recording.tensors:
            x = logits.detach().clone().requires_grad_()
            token_loss(x[real], target[real], **settings).backward()
            report.check_gradient(recording, f"dlogits.{case}.{name}", x.grad)


def check_gradients(report: Report, recording: Recording, model: Unival, case: str, given: Case) -> None:
    """Every recorded gradient of the mean loss without smoothing."""
    names = [name for name in recording.tensors for i in _case_place(name) if name.split(".")[i] == case]
    parameters = {name.partition(f"grad.{case}.")[2] for name in names if f"grad.{case}." in name}
    if not parameters and not any(name.startswith("dinput.") for name in names):
        return
    model.zero_grad(set_to_none=True)
    model.loss(given.source, given.target, **given.code, **given.arguments).backward()
    for name, x in given.features.items():
        if f"dinput.{case}.{name}" in recording.tensors:
            report.check_gradient(recording, f"dinput.{case}.{name}", x.grad)
    found = model.to_upstream_state_dict(grads=True)
    for name in sorted(parameters):
        if name.endswith(WITHOUT_EFFECT):
            kind = next((f"{kind}." for kind in PROJECTIONS if f"{kind}.grad.{case}.{name}" in recording.tensors), "")
            want = recording[f"{kind}grad.{case}.{name}"]
            report.check(f"grad.{case}.{name}", found[name], torch.zeros_like(want), 0, floor=ZERO)
        else:
            report.check_gradient(recording, f"grad.{case}.{name}", found.get(name))
