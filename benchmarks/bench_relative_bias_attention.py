"""Attention with a relative position bias: the kernel against PyTorch's attention, FlexAttention and peers."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.support.on_gpu import ATTENTION, ATTENTION_SHAPES, attention_operation, run, skip_without_gpu
from benchmarks.support.variants import MODES

pytestmark = skip_without_gpu


@pytest.mark.parametrize("shape", ATTENTION_SHAPES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", ATTENTION)
def test_relative_bias_attention(shape: str, variant: str, mode: str, benchmark: Any) -> None:
    """One variant; rounds rotate through inputs larger than the L2 together."""
    group = f"relative_bias_attention, {mode}, {shape} tokens"
    run(attention_operation(shape), variant, mode, group, benchmark)
