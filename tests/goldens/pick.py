"""Keep some tensors of a recording, unchanged, with its metadata: one file of tests/goldens.

    PYTHONPATH=tests python tests/goldens/pick.py RECORDING.safetensors OUT.safetensors.xz PREFIX[=NEW]...

Every tensor whose name starts with a PREFIX stays, under the same name or with NEW in the prefix's place.
"""

from __future__ import annotations

import lzma
import sys
from pathlib import Path

from goldens.reduce import FILTERS, read
from safetensors.torch import save


def main(recording: Path, target: Path, prefixes: list[str]) -> None:
    """Write the tensors, compressed as all recordings here are."""
    tensors, metadata = read(recording)
    chosen = {}
    for prefix, _, new in (text.partition("=") for text in prefixes):
        for name, value in tensors.items():
            if name.startswith(prefix):
                chosen[(new or prefix) + name.removeprefix(prefix)] = value
    target.write_bytes(lzma.compress(save(dict(sorted(chosen.items())), metadata=metadata), filters=FILTERS))
    print(f"{target}: {target.stat().st_size:,} bytes, {', '.join(sorted(chosen))}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
