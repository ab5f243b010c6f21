"""What the device can do at most, measured in the same run: copying memory, and one large matrix product."""

from __future__ import annotations

from typing import Any

import torch

from onepeace_fast.timing import HostClock, interleaved, recovered


def ceilings(
    device: torch.device, dtype: torch.dtype, clock: HostClock, *, side: int, copy_bytes: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """Bandwidth of a device copy, bytes read plus bytes written, and the rate of a square product; errors as text."""
    calls, amounts = {}, {}

    def prepare_copy() -> None:
        source = torch.randn(copy_bytes // 4, device=device)
        target = torch.empty_like(source)
        calls["copy"] = lambda _: target.copy_(source)
        amounts["copy"] = (2 * source.nbytes, "GB_per_second", 1e9)

    def prepare_product() -> None:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        c = torch.empty_like(a)
        calls["product"] = lambda _: torch.mm(a, b, out=c)
        amounts["product"] = (2 * side**3, "TFLOP_per_second", 1e12)

    records: dict[str, dict[str, Any]] = {"copy": {"bytes": copy_bytes}, "product": {"side": side, "dtype": str(dtype)}}
    for name, prepare in (("copy", prepare_copy), ("product", prepare_product)):
        try:
            prepare()
        except Exception as error:
            records[name]["error"] = recovered(clock, name, error)
    timings, errors = interleaved(calls, clock, rounds=rounds)
    for name, timing in timings.items():
        amount, unit, scale = amounts[name]
        records[name] |= {**timing.record(), unit: round(amount / timing.median / scale, 2)}
    for name, error in errors.items():
        records[name]["error"] = error
    return records
