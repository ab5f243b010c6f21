"""What the machine is: processor or GPU, versions, clocks as they are found; nothing is ever set."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from onepeace_fast import info

QUERY = (
    "name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw", "power.limit",
    "temperature.gpu", "clocks_throttle_reasons.active",
)  # fmt: skip


def processor() -> str:
    """The processor's model."""
    information = Path("/proc/cpuinfo")
    if information.exists() and (found := re.search(r"model name\s*: (.*)", information.read_text(encoding="utf-8"))):
        return found[1]
    return platform.processor() or platform.machine()


def nvidia_smi() -> dict[str, str]:
    """Clocks, driver and power by one call of nvidia-smi; an ``error`` where it cannot be asked."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {"error": "nvidia-smi is not found"}
    answer = None
    for names in (QUERY, QUERY[:-1]):  # a driver that does not know the last one answers nothing at all
        command = [program, f"--query-gpu={','.join(names)}", "--format=csv,noheader", "--id=0"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired) as error:
            return {"error": str(error)}
        values = [value.strip() for value in answer.stdout.strip().split(",")]
        if answer.returncode == 0 and len(values) == len(names):
            return dict(zip(names, values, strict=True))
    return {"error": " ".join((answer.stdout + answer.stderr).split())}


def versions() -> dict[str, str]:
    """Versions of everything that decides a time."""
    found = info.versions()
    cuda = {"cuda_of_torch": found.pop("cuda"), "cudnn": str(torch.backends.cudnn.version())}
    return {"python": platform.python_version(), **found, **cuda}


def describe(device: torch.device) -> dict[str, Any]:
    """The machine and its versions; on a GPU also its name, capability and clocks."""
    machine = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine["gpu"] = properties.name
        machine["capability"] = f"{properties.major}.{properties.minor}"
        machine["gpu_memory_bytes"] = properties.total_memory
        machine["nvidia_smi"] = nvidia_smi()
    return machine


def now() -> str:
    """The time of day in UTC, fit for a file's name."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H%MZ")


def file_name(kind: str, machine: dict[str, Any], date: str) -> str:
    """Name of a results file: kind, GPU or processor, date."""
    model = re.sub(r"[^A-Za-z0-9]+", "-", machine.get("gpu") or machine["processor"]).strip("-")
    return f"{kind}_{model}_{date}.json"
