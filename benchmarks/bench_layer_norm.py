"""LayerNorm over packed rows: the kernel against eager, compiled and peers, 9.5k tokens."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.support.on_gpu import MODES, VARIANTS, run_pointwise, skip_without_gpu

pytestmark = skip_without_gpu


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", VARIANTS["layer_norm"])
def test_layer_norm(variant: str, mode: str, benchmark: Any) -> None:
    """One variant; rounds rotate through inputs larger than the L2 together."""
    run_pointwise("layer_norm", variant, mode, benchmark)
