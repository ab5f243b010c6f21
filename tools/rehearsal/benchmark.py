"""`benchmarks/gpu.py --quick` on the emulated GPU, whose clock says a millisecond for everything."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from tools.rehearsal import two_devices
from tools.rehearsal.driver import Driver
from tools.rehearsal.emulation import emulated_gpu
from tools.rehearsal.native import ROOT

# What no emulated tensor can show, by a word of the error that says so.
NOT_EMULATED = ("torch.compile", "Triton do_bench")


def main() -> int:
    """Print one JSON object: faults, programs and launches."""
    driver = Driver(os.environ.get("REHEARSAL_ARCHITECTURE", "sm_90"), os.environ.get("REHEARSAL_COMPILING") == "1")
    sys.path.insert(0, str(ROOT))
    faults: list[str] = []
    with emulated_gpu(driver), tempfile.TemporaryDirectory() as folder:
        from benchmarks import gpu

        try:
            code = gpu.main(["--out", folder, "--quick", "--budget-seconds", "60"])
        except Exception as error:
            faults.append(f"benchmarks/gpu.py: {type(error).__name__}: {str(error).splitlines()[0]}")
        else:
            for path in Path(folder).glob("*.json"):
                found = json.loads(path.read_text(encoding="utf-8"))["errors"]
                faults += [f"benchmarks/gpu.py: {line}" for line in found]
            faults = [line for line in faults if not any(word in line for word in NOT_EMULATED)]
            if code and not faults:
                faults.append(f"benchmarks/gpu.py: expected exit code 0, got {code}")
    print(json.dumps({"faults": faults, "programs": driver.programs, "launches": two_devices.State.launches}))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
