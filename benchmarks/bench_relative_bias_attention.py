"""Attention with a relative position bias: the kernel against PyTorch's attention, FlexAttention and peers."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.support.on_gpu import ATTENTION_SHAPES, MODES, VARIANTS, run_attention, skip_without_gpu

pytestmark = skip_without_gpu


@pytest.mark.parametrize("shape", ATTENTION_SHAPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", VARIANTS["relative_bias_attention"])
def test_relative_bias_attention(shape: str, variant: str, mode: str, benchmark: Any) -> None:
    """One variant; rounds rotate through inputs larger than the L2 together."""
    run_attention(shape, variant, mode, benchmark)
