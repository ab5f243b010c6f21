"""UnIVAL's buckets of relative positions, in its texts and its images."""

from __future__ import annotations

import torch
from torch import Tensor

from onepeace_fast import RelativeBias
from tools.parity.recording import Recording, RecordingError
from tools.parity.report import Report


def compare(recording: Recording, backend: str) -> Report:
    """Every bucket, exactly; there is one way to them, whatever the backend."""
    if others := [name for name in sorted(recording.tensors) if not name.startswith("buffer.")]:
        raise RecordingError(f"expected of mshukor/UnIVAL a recording of its buckets, buffer.*, got also {others[0]}")
    report, config = Report(), recording.json("config")
    for name, want in recording.pick("buffer.").items():
        if name == "image_rp_bucket":
            bias = RelativeBias.one_peace(1, grid=config["image_bucket_size"])
            report.check_bits(name, buckets(bias, want.shape[0]), want)
            continue
        stem, _, direction = name.rpartition("_")
        size = int(stem.rpartition("_S")[2]) if "_S" in stem else config["token_bucket_size"]
        found = buckets(RelativeBias.one_peace(1, buckets=size, with_cls=False), want.shape[0])
        report.check_bits(name, found[:, 0] if direction == "col0" else found[0], want)
    return report


def buckets(bias: RelativeBias, length: int) -> Tensor:
    """The table's row of every pair of positions."""
    with torch.no_grad():
        bias.table.copy_(torch.arange(bias.table.shape[0])[:, None])
        return bias.dense(length)[0].long()
