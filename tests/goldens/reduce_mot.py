"""Reduce the recording of Mixture-of-Transformers' feed-forward network to what the test compares.

    python tests/goldens/reduce_mot.py mot_ffn.safetensors --out tests/goldens

The parameters and inputs are torch's random numbers of two seeds: ``drawn`` draws them again, and the file keeps the
first eight of each. Outputs keep their values; the gradients of the inputs become int16 with one float32 scale each,
as in ``reduce.py``. Of each gradient G of a matrix remain G r and l G, with r and l = cos(1), cos(2), ...: an error
anywhere in G changes both.
"""

from __future__ import annotations

import argparse
import lzma
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

EXPERTS, DIM, HIDDEN, SAMPLES, LENGTH = 3, 128, 224, 2, 45
CASES = ("partition", "empty1", "overlap")


def drawn() -> dict[str, Tensor]:
    """The recorded parameters and inputs: 1 + 0.2 N in norms, 1.5 / sqrt(columns) N in matrices."""
    generator, found = torch.Generator().manual_seed(77), {}
    for m in range(EXPERTS):
        for name, shape in (("w1", (HIDDEN, DIM)), ("w3", (HIDDEN, DIM)), ("w2", (DIM, HIDDEN))):
            values = torch.randn(shape, generator=generator)
            found[f"param.local_experts.{m}.{name}.weight"] = values * (1.5 / shape[1] ** 0.5)
    for m in range(EXPERTS):
        found[f"param.local_experts_ffn_norm.{m}.weight"] = 1 + 0.2 * torch.randn(DIM, generator=generator)
    generator = torch.Generator().manual_seed(78)
    for name in ("x", "loss_weight"):
        found[f"input.{name}"] = torch.randn(SAMPLES, LENGTH, DIM, generator=generator)
    torch.rand(2 * SAMPLES * LENGTH, generator=generator)  # the masks of the case "overlap"
    found["input.eps_probe.x"] = 0.03 * torch.randn(SAMPLES, LENGTH, DIM, generator=generator)
    return found


def projections(gradient: Tensor) -> dict[str, Tensor]:
    """G r and l G of a matrix; a vector itself."""
    if gradient.dim() == 1:
        return {"whole": gradient}
    left, right = (torch.arange(1, size + 1, dtype=torch.float64).cos() for size in gradient.shape)
    wide = gradient.double()
    return {"right": (wide @ right).float(), "left": (left @ wide).float()}


def reduce(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors to write."""
    from reduce import quantise

    result = {f"first.{name}": value.flatten()[:8].clone() for name, value in drawn().items()}
    for name, value in drawn().items():
        if not torch.equal(value, tensors[name]):
            raise SystemExit(f"{name}: expected the numbers of the recording's seed, got others")
    if not torch.equal(tensors["out.partition_flat"], tensors["out.partition"].flatten(0, 1)):
        raise SystemExit("out.partition_flat: expected out.partition's values, got others")
    result["out.eps_probe"] = tensors["out.eps_probe"]
    for case in CASES:
        result[f"input.{case}.masks"] = tensors[f"input.{case}.masks"].to(torch.uint8)
        result[f"out.{case}"] = tensors[f"out.{case}"]
        name = f"dinput.{case}.x"
        result[name], result[f"scale.{name}"] = quantise(tensors[name])
        for name in (name for name in tensors if name.startswith(f"grad.{case}.")):
            result |= {f"{kind}.{name}": value for kind, value in projections(tensors[name]).items()}
    return {name: result[name].contiguous() for name in sorted(result)}


def main() -> None:
    """Reduce the file of the command line."""
    from reduce import FILTERS, read

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, metavar="RECORDING")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    arguments = parser.parse_args()
    tensors, metadata = read(arguments.file)
    target = arguments.out / f"{arguments.file.name}.xz"
    target.write_bytes(lzma.compress(save(reduce(tensors), metadata=metadata), filters=FILTERS))
    print(f"{target}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
