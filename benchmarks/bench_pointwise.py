"""The operations between the products: the kernels against eager, compiled and peers, 9.5k tokens."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.support.on_gpu import POINTWISE, SHAPE, operation, run, skip_without_gpu
from benchmarks.support.variants import MODES

pytestmark = skip_without_gpu


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name, variant", [(name, variant) for name in POINTWISE for variant in POINTWISE[name]])
def test_pointwise(name: str, variant: str, mode: str, benchmark: Any) -> None:
    """One variant; rounds rotate through inputs larger than the L2 together."""
    run(operation(name), variant, mode, f"{name}, {mode}, {SHAPE.real_tokens} rows", benchmark)
