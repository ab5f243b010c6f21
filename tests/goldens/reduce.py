"""Reduce recordings of upstream ONE-PEACE to what the tests compare, small enough for a repository.

    python tests/goldens/reduce.py RECORDING.safetensors... --out tests/goldens [--gradient-bytes 900000]

Writes NAME.safetensors.xz for each NAME.safetensors; `xz -d` gives an ordinary safetensors file. Names, shapes and
metadata stay those of the recording, and so does every value but these:

- rows of embeddings that no input reads become NaN, so that a comparison also proves that nothing reads them;
- outputs at padding, which mean nothing, become zero;
- gradients become int16 with one float32 scale each, under ``scale.NAME``: off by at most 1.6e-5 of the largest entry;
- gradients past ``--gradient-bytes``, smallest first, are left out.

Everything that became constant vanishes in the compression, which reads floats by their four byte planes (lp=2).
"""

from __future__ import annotations

import argparse
import lzma
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 2, "lp": 2, "pb": 2}]
STEPS = 32767


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a recording and its metadata."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def forget_unread_rows(name: str, value: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """NaN in the rows of an embedding that no input reads."""
    widths = {"text": inputs["src_tokens"].shape[1] + 1, "audio": inputs["audio_padding_masks"].shape[1]}
    read_rows = torch.ones(value.shape[:1], dtype=torch.bool)
    for modality, width in widths.items():
        if name.endswith(f"{modality}_adapter.embed_positions.weight"):
            read_rows = torch.arange(value.shape[0]) < width
    if name.endswith("embed_tokens.weight"):
        read_rows = torch.zeros_like(read_rows).index_fill(0, inputs["src_tokens"].flatten(), True)
    return value if bool(read_rows.all()) else value.masked_fill(~read_rows[:, None], torch.nan)


def forget_padding(name: str, value: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Zero in an output's rows at padding; ``name`` is out.PASS.KIND.PLACE."""
    _, _, kind, place = name.split(".")
    modality = {"vl": ("text", "image"), "al": ("text", "audio")}.get(kind, (kind,))[int(place)]
    if value.dim() < 3 or modality == "image":
        return value
    tokens = inputs["src_tokens"]
    text = torch.cat([torch.zeros_like(tokens[:, :1], dtype=torch.bool), tokens == 1], dim=1)
    padding = text if modality == "text" else inputs["audio_padding_masks"].bool()
    return value.masked_fill(padding[..., None], 0)


def quantise(value: Tensor) -> tuple[Tensor, Tensor]:
    """int16 and the float32 scale that multiplies it."""
    scale = value.abs().max() / STEPS
    return (value / scale.clamp(min=torch.finfo(torch.float32).tiny)).round().to(torch.int16), scale


def reduce(tensors: dict[str, Tensor], gradient_bytes: int) -> dict[str, Tensor]:
    """The tensors to write."""
    inputs = {name.removeprefix("input."): value for name, value in tensors.items() if name.startswith("input.")}
    result: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name.startswith("param."):
            result[name] = forget_unread_rows(name, value, inputs) if value.dim() == 2 else value
        elif name.startswith("out."):
            result[name] = forget_padding(name, value, inputs)
        elif not name.startswith("grad."):
            result[name] = value
    left = gradient_bytes
    sizes = {name: 2 * int(value.count_nonzero()) for name, value in tensors.items() if name.startswith("grad.")}
    for name in sorted(sizes, key=lambda name: (sizes[name], name)):
        left -= sizes[name]
        if left >= 0:
            result[name], result[f"scale.{name}"] = quantise(tensors[name])
    return {name: result[name].contiguous() for name in sorted(result)}


def main() -> None:
    """Reduce the files of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="RECORDING")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--gradient-bytes", type=int, default=900_000, help="of each file's nonzero int16 entries")
    arguments = parser.parse_args()
    for path in arguments.files:
        tensors, metadata = read(path)
        reduced = reduce(tensors, arguments.gradient_bytes)
        target = arguments.out / f"{path.name}.xz"
        target.write_bytes(lzma.compress(save(reduced, metadata=metadata), filters=FILTERS))
        gradients = [sum(n.startswith("grad.") for n in names) for names in (reduced, tensors)]
        print(f"{target}: {target.stat().st_size:,} bytes, {gradients[0]} of {gradients[1]} gradients")


if __name__ == "__main__":
    main()
