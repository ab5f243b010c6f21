"""Reduce recordings whose parameters and inputs are torch's random numbers of a seed.

    PYTHONPATH=.:tests python tests/goldens/reduce_drawn.py RECORDING.safetensors... --out tests/goldens

``tools/parity/drawn.py`` draws them again, and the file keeps the first eight of each; inputs that it does not draw are
kept. Outputs keep their values, but zeros stand at padding. The gradients of inputs and logits become int16 with one
float32 scale each, as in ``reduce.py``. Of each gradient G of a matrix remain G r and l G, with r and l = cos(1),
cos(2), ...: an error anywhere in G changes both. MiCo's larger outputs and gradients of inputs are so too. A case
"_flat", whose outputs are those of the case without it, is left out.
"""

from __future__ import annotations

import argparse
import lzma
from pathlib import Path

import torch
from goldens.reduce import FILTERS, quantise, read
from safetensors.torch import save
from torch import Tensor

from tools.parity.drawn import BY_UPSTREAM
from tools.parity.report import projections

PADDED = ("split", "allB", "caption")  # cases of torchscale
LARGE = 4096  # numbers of one of MiCo's tensors


def forget_padding(name: str, value: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """Zero in the rows at padding, which mean nothing."""
    _, case, *rest = name.split(".")
    if rest == ["encoder_out"] and f"out.{case}.encoder_padding_mask" in tensors:  # UnIVAL's
        return value.masked_fill(tensors[f"out.{case}.encoder_padding_mask"].bool()[..., None], 0)
    if rest == ["logits"]:
        ids = tensors[f"input.{'code_' if case == 'code' else ''}prev_output_tokens"]
        return value.masked_fill((ids == 1)[..., None], 0)
    if case not in PADDED:
        return value
    return value.masked_fill(tensors["input.encoder_padding_mask"].bool()[..., None], 0)


def reduce(tensors: dict[str, Tensor], metadata: dict[str, str]) -> dict[str, Tensor]:
    """The tensors to write."""
    found = BY_UPSTREAM[metadata["upstream"]](metadata) if any(name.startswith("param.") for name in tensors) else {}
    for name, value in found.items():
        if not torch.equal(value, tensors[name]):
            raise SystemExit(f"{name}: expected the numbers of the recording's seed, got others")
    result = {f"first.{name}": value.flatten()[:8].clone() for name, value in found.items()}
    for name, value in tensors.items():
        prefix = name.partition(".")[0]
        if "_flat" in name:
            own = tensors[name.replace("_flat", "")]
            if prefix == "out" and not torch.equal(value, own.view_as(value)):
                raise SystemExit(f"{name}: expected the values of the case without _flat, got others")
        elif "MiCo" in metadata["upstream"] and prefix in ("out", "mid", "dinput") and value.numel() > LARGE:
            result |= {f"{kind}.{name}": part for kind, part in projections(value).items()}
        elif prefix in ("out", "mid"):
            result[name] = forget_padding(name, value, tensors)
        elif prefix in ("dinput", "dlogits"):
            result[name], result[f"scale.{name}"] = quantise(value)
        elif prefix == "grad":
            result |= {f"{kind}.{name}": part for kind, part in projections(value).items()}
        elif "mask" in name:
            result[name] = value.to(torch.uint8)
        elif prefix in ("buffer", "loss") or (prefix == "input" and name not in found):
            result[name] = value
    return {name: result[name].contiguous() for name in sorted(result)}


def main() -> None:
    """Reduce the files of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="RECORDING")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    arguments = parser.parse_args()
    for path in arguments.files:
        tensors, metadata = read(path)
        target = arguments.out / f"{path.name}.xz"
        raw = save(reduce(tensors, metadata), metadata=dict(sorted(metadata.items())))
        target.write_bytes(lzma.compress(raw, filters=FILTERS))
        print(f"{target}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
