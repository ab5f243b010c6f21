"""What `onepeace-fast info` prints: versions, the GPU, and what works on this machine and why the rest does not."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import onepeace_fast
from onepeace_fast import cuda_extension, ops
from onepeace_fast.backend import BACKENDS, ENVIRONMENT_VARIABLE, resolve_backend
from onepeace_fast.installation import install_command, program_command

OPERATIONS = tuple(ops.__all__)
DEMO_PACKAGES = {
    "scikit-learn": "sklearn", "scipy": "scipy", "espeakng-loader": "espeakng_loader", "soundfile": "soundfile",
    "matplotlib": "matplotlib", "jinja2": "jinja2", "tqdm": "tqdm",
}  # fmt: skip
DEMO_INSTALL = install_command("demo")
TRAINING_PACKAGES = {
    "pyyaml": "yaml", "tokenizers": "tokenizers", "tensorboard": "tensorboard", "tqdm": "tqdm",
}  # fmt: skip
TRAINING_INSTALL = install_command("train")
SENDING_IN = "to send its file in, add it to kernels/measured/ by a pull request, or attach it to an issue"
_BACKEND_NOTES = {
    "reference": "padded tokens, plain PyTorch, as upstream computes it",
    "fused": "packed tokens, by the fused operations",
}
_AUTOMATIC_ON_A_CPU = {
    "reference": "automatic for other batches",
    "fused": "automatic for batches with enough padding",
}


def missing(packages: Mapping[str, str]) -> list[str]:
    """The packages whose modules are not installed."""
    return [package for package, module in packages.items() if not _installed(module)]


def format_table(rows: Sequence[Sequence[str]], indent: str = "  ") -> str:
    """Align columns of text: all but the last are padded to their widest entry."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(f"{indent}{line}".rstrip() for line in lines)


def describe() -> str:
    """The whole report; what cannot be found out says so in its place."""
    found = versions()
    shown = [
        ("onepeace_fast", found["onepeace_fast"]),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", found["torch"]),
        ("CUDA of torch", found["cuda"]),
        ("Triton", found["triton"]),
        ("NVIDIA driver", found["driver"]),
        ("GPU", _attempt(_gpu)),
    ]
    rows = [("What", "Here", "Why"), *_backends()]
    rows += [(f"operation {name}", "works", _implementation(name)) for name in OPERATIONS]
    rows += [
        ("Triton kernels", *_triton_kernels()),
        ("measurements of the GPU", *_measurements()),
        ("CUDA extension", *_cuda_extension()),
        ("torch.compile on a CPU", *_compiler()),
        ("onepeace-fast demo", *_command(DEMO_PACKAGES, DEMO_INSTALL)),
        ("onepeace-fast train", *_command(TRAINING_PACKAGES, TRAINING_INSTALL)),
    ]
    return f"Versions\n{format_table(shown)}\n\nWhat works here\n{format_table(rows)}"


def versions() -> dict[str, str]:
    """Versions of what a measurement depends on, for people."""
    return {
        "onepeace_fast": onepeace_fast.__version__,
        "torch": torch.__version__,
        "cuda": _attempt(lambda: torch.version.cuda or "none (a build for CPUs)"),
        "triton": _attempt(_triton_version),
        "driver": _attempt(_driver),
    }


def _attempt(find_out: Callable[[], str]) -> str:
    try:
        return find_out()
    except Exception as error:  # a damaged installation may raise anything, and this report shows it
        return f"cannot be found out: {' '.join(f'{type(error).__name__}: {error}'.split())}"


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _triton_version() -> str:
    return importlib.import_module("triton").__version__ if _installed("triton") else "none"


def _driver() -> str:
    if program := shutil.which("nvidia-smi"):
        query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20)
        if answer.returncode == 0 and answer.stdout.strip():
            return answer.stdout.split()[0]
    version = Path("/proc/driver/nvidia/version")
    return version.read_text(encoding="utf-8").splitlines()[0] if version.exists() else "none found"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none"
    found = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        found.append(f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}")
    return "; ".join(found)


def _backends() -> list[tuple[str, str, str]]:
    """A row for each backend, which says when it is the automatic one."""
    rows = []
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = _attempt(lambda: resolve_backend(None, torch.device(kind)))
    when = {chosen: "automatic here"}
    if os.environ.get(ENVIRONMENT_VARIABLE):
        when = {chosen: f"chosen by {ENVIRONMENT_VARIABLE}"}
    elif kind == "cpu" and chosen in BACKENDS:
        when = _AUTOMATIC_ON_A_CPU
    for name in BACKENDS:
        here = f"works; {when[name]}" if name in when else "works"
        rows.append((f"backend {name}", here, _BACKEND_NOTES[name]))
    if chosen not in BACKENDS:
        rows.append(("automatic backend", "no", chosen))
    return rows


def _implementation(operation: str) -> str:
    """What computes an operation."""
    reference = "reference (eager PyTorch)"
    if operation == "relative_bias_attention":
        return (
            "CUDA kernels, forward and backward, on float16 and bfloat16 CUDA tensors with heads of at most 128, "
            "else PyTorch's attention, and gradients by the reference in chunks of heads; "
            f"{reference} on a CPU and for float64"
        )
    if operation == "routed_ffn":
        return (
            "the vendor's products with Triton kernels between them and one in place of a product, or by "
            f"strategy='grouped' Triton kernels alone, on CUDA tensors; {reference} on a CPU and for float64"
        )
    if operation == "routed_linear":
        return (
            "the vendor's product for each modality, or one Triton launch where the host does not know the rows, on "
            f"CUDA tensors; {reference} on a CPU and for float64"
        )
    from onepeace_fast.kernels.launch_heuristic import WIDEST

    most = next((most for name, most in WIDEST.items() if operation.startswith(name)), None)
    if most is None:
        return f"{reference} everywhere"
    return (
        f"Triton kernel on CUDA tensors of at most {most} columns; {reference} on wider ones, on a CPU and for float64"
    )


def _measurements() -> tuple[str, str]:
    """Which file says how this GPU was measured, and what to do where none does."""
    if not torch.cuda.is_available():
        return "no", "no GPU"
    found = _attempt(_measurement)
    return ("yes" if found.startswith("measured") else "no"), found


def _measurement() -> str:
    from onepeace_fast.kernels.measured import SHIPPED_FOLDER, gpu_name, measured_file, measured_for

    name = gpu_name(torch.device("cuda"))
    measured, path = measured_for(name), measured_file(name)
    if measured is None:
        return f"not measured on this GPU: `{program_command('selftest')}` measures it; {SENDING_IN}"
    if not measured.parity:
        why = "not held against the reference, or not within its tolerance"
        return f"{why}: `{program_command('selftest')}`; {path}"
    line = f"measured on {measured.date}, every operation within its tolerance: {path}"
    return line if path.parent == SHIPPED_FOLDER else f"{line}; {SENDING_IN}"


def _triton_kernels() -> tuple[str, str]:
    def kernels() -> Any:
        return importlib.import_module("onepeace_fast.kernels")

    if reason := _attempt(lambda: kernels().unavailable_reason() or ""):
        return "no", reason
    if kernels().INTERPRETED:
        return "works", "in Triton's interpreter, as TRITON_INTERPRET=1 asks"
    return ("works", "on CUDA tensors") if torch.cuda.is_available() else ("no", "no GPU; Triton itself is usable")


def _cuda_extension() -> tuple[str, str]:
    """Whether the extension is there, for which GPUs, and what keeps it from running here."""
    reason = _attempt(lambda: cuda_extension.unavailable_reason() or "")
    if cuda_extension.extension() is None:
        return "no", reason
    built = f"built by CUDA {cuda_extension.extension().TOOLKIT} for {cuda_extension.extension().ARCHITECTURES}"
    if not reason:
        reason = "" if torch.cuda.is_available() else "torch sees no GPU"
    for index in range(0 if reason else torch.cuda.device_count()):
        reason = reason or cuda_extension.unsupported_reason(torch.cuda.get_device_capability(index)) or ""
    return ("no", f"{built}; {reason}") if reason else ("works", built)


def _compiler() -> tuple[str, str]:
    """Whether torch.compile finds a C++ compiler, by its own rule: CXX, else the usual names."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++", "cl"]
    found = next((path for name in names if (path := shutil.which(name))), None)
    return ("works", f"C++ compiler {found}") if found else ("no", f"no C++ compiler found ({', '.join(names)})")


def _command(packages: Mapping[str, str], install: str) -> tuple[str, str]:
    if absent := missing(packages):
        return "no", f"{', '.join(absent)} not installed: {install}"
    return "works", "its packages are installed"
