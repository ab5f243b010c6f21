"""LayerScale, DropPath's factor, residual stream and LayerNorm in one: the kernel against eager and compiled."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.support.on_gpu import MODES, VARIANTS, run_pointwise, skip_without_gpu

pytestmark = skip_without_gpu


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", VARIANTS["residual"])
def test_residual(variant: str, mode: str, benchmark: Any) -> None:
    """One variant; rounds rotate through inputs larger than the L2 together."""
    run_pointwise("residual", variant, mode, benchmark)
