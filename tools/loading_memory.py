"""Memory that from_pretrained takes beside the file's own pages, while it builds a model of upstream's checkpoint.

    python -m tools.loading_memory --folder DIR [--layers N] [--out FILE]

It writes checkpoints of random numbers in upstream's form into DIR, the public 4 B model's shape unless ``--layers``
says otherwise: one in float32 (15.5 GB) and one in bfloat16. Each is loaded in bfloat16 by a fresh process, whose
anonymous memory (RssAnon) is watched from outside, and removed. Anonymous memory is what counts where memory is short:
pages of a file can be dropped. Linux alone.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from onepeace_fast import OnePeaceConfig, OnePeacePretrain
from onepeace_fast.models.parameter_names import upstream_names

LIMIT = 1.15  # peak of anonymous memory, as a share of the model's bytes
_LOAD = """
import sys
import torch
from onepeace_fast import from_pretrained
torch.randn(9).bfloat16()
print("ready", flush=True)
sys.stdin.readline()
model = from_pretrained(sys.argv[1], dtype=sys.argv[2])
print(sum(parameter.nbytes for parameter in model.parameters()), flush=True)
sys.stdin.readline()
"""


@dataclass(frozen=True)
class Measured:
    """One file loaded: bytes of file and model, the peak of anonymous memory above what stood before, and seconds."""

    file_dtype: str
    file_bytes: int
    model_bytes: int
    peak_bytes: int
    seconds: float

    @property
    def share(self) -> float:
        """The peak as a share of the model's bytes."""
        return self.peak_bytes / self.model_bytes


def config_of(layers: int | None) -> OnePeaceConfig:
    """The public model's configuration, with fewer layers where they are given."""
    config = OnePeaceConfig()
    return config if layers is None else replace(config, encoder=replace(config.encoder, layers=layers))


def settings_of(config: OnePeaceConfig) -> dict[str, Any]:
    """The public model's settings, as upstream saves them."""
    wide = {"magneto_scale_attn": True, "scale_attn": False, "scale_heads": False, "dropout": 0.0}
    biased = {name: {"use_attn_bias": True} for name in ("text_adapter", "image_adapter", "audio_adapter")}
    biased["audio_adapter"]["bucket_size"] = 512
    sections = {}
    for name, stack in (("encoder", config.encoder), ("decoder", config.decoder)):
        sizes = {key: getattr(stack, key) for key in ("embed_dim", "ffn_embed_dim", "layers", "attention_heads")}
        sections[name] = {**wide, **sizes, "use_layer_scale": stack.layer_scale is not None}
    sections["encoder"] |= biased
    sections["decoder"] |= {
        "image_adapter": {"vision_encoder_type": "none"},
        "audio_adapter": {"abs_pos_type": "fixed"},
    }
    return {"model": {"_name": "one_peace_pretrain", **sections}, "task": {"patch_image_size": 256}}


def write(path: Path, config: OnePeaceConfig, dtype: torch.dtype, quiet: bool = False) -> None:
    """Write a checkpoint of random numbers without holding them: each parameter maps one file of random bytes anew."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in upstream_names(OnePeacePretrain(config)).items()}
    noise = path.with_suffix(".noise")
    values = torch.randn(max(shape.numel() for shape in shapes.values())).to(dtype)
    noise.write_bytes(values.view(torch.uint8).numpy().tobytes())
    state = {
        name: torch.from_file(str(noise), shared=False, size=shape.numel(), dtype=dtype).view(shape)
        for name, shape in shapes.items()
    }
    total = sum(value.nbytes for value in state.values())
    bar = tqdm(total=total, desc=f"write {path.name}", unit="B", unit_scale=True, disable=quiet)
    with path.open("wb") as file:
        torch.save({"cfg": settings_of(config), "model": state, "extra_state": {}}, _Counted(file, bar))
    bar.close()
    noise.unlink()


class _Counted:
    """A file whose writes move a bar."""

    def __init__(self, file: Any, bar: Any) -> None:
        self._file, self._bar = file, bar

    def write(self, data: Any) -> int:
        self._bar.update(len(data))
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def anonymous_bytes(process: int) -> int:
    """Anonymous memory of a process."""
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]  # Linux has it


def measure(path: Path, file_dtype: str, dtype: str = "bf16", quiet: bool = False) -> Measured:
    """Load a file in a fresh process and watch its anonymous memory."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", _LOAD, str(path), dtype], **pipes) as child:  # type: ignore[call-overload]
        child.stdout.readline()
        before = peak = anonymous_bytes(child.pid)
        bar = tqdm(desc=f"load {path.name}", unit="B", unit_scale=True, disable=quiet)
        start = time.perf_counter()
        child.stdin.write("\n")
        child.stdin.flush()
        told: list[str] = []
        reader = threading.Thread(target=lambda: told.append(child.stdout.readline()))
        reader.start()
        while reader.is_alive():
            now = anonymous_bytes(child.pid)
            bar.update(max(now - peak, 0))
            peak = max(peak, now)
            reader.join(0.005)
        seconds = time.perf_counter() - start
        bar.close()
        child.stdin.write("\n")
        child.stdin.flush()
    if not told or not told[0].strip():
        raise RuntimeError(f"{path}: the process that loads it failed")
    return Measured(file_dtype, path.stat().st_size, int(told[0]), peak - before, round(seconds, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory that from_pretrained takes.")
    parser.add_argument("--folder", type=Path, required=True, help="where the files are written, and removed")
    parser.add_argument("--layers", type=int, help="of the encoder; 40 in the public model")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args()
    rows = []
    for dtype in ("float32", "bfloat16"):
        path = arguments.folder / f"{dtype}.pt"
        try:
            write(path, config_of(arguments.layers), getattr(torch, dtype))
            rows.append(measure(path, dtype))
        finally:
            path.unlink(missing_ok=True)
        one = rows[-1]
        print(
            f"{dtype} file of {one.file_bytes / 1e9:.2f} GB to a bfloat16 model of {one.model_bytes / 1e9:.2f} GB: "
            f"peak {one.peak_bytes / 1e9:.2f} GB, {one.share:.3f} of the model, {one.seconds} s",
            flush=True,
        )
    if arguments.out:
        record = {
            "torch": torch.__version__,
            "limit": LIMIT,
            "files": [{**asdict(one), "share": one.share} for one in rows],
        }
        arguments.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if any(one.share > LIMIT for one in rows):
        sys.exit(f"expected a peak of at most {LIMIT} of the model's bytes")


if __name__ == "__main__":
    main()
