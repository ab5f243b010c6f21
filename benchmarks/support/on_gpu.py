"""The operations alone under pytest-benchmark, on a GPU: `make bench` there, or one file by its name."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch

from benchmarks.support import relative_bias_attention as attention
from benchmarks.support import sections
from benchmarks.support.pointwise import Operation, PointwiseCase, operations
from benchmarks.support.shapes import Shape, Sizes
from benchmarks.support.variants import LeftOut, Variant

SHAPE, SIZES = sections.full_shapes()[0], sections.FULL
# Of tensors that hold nothing: only the names are asked for.
_NOTHING = PointwiseCase(
    Shape("one", {"text": [1]}), Sizes(1, 1, 1), torch.device("meta"), torch.float32, 1, stream=torch.float32
)
POINTWISE = {name: tuple(make().factories) for name, make in operations(_NOTHING).items()}
ATTENTION = (
    "bias_built_sdpa_memory_efficient", "sdpa_memory_efficient", "sdpa_cudnn", "xformers", "flex_attention",
    "flash_attention_no_bias", "fused_no_bias", "fused_frozen_tables", "fused",
)  # fmt: skip
ATTENTION_SHAPES = {shape.name: shape for shape in attention.full_shapes()}
ROUNDS, WARM_UP, SETS = 50, 5, 4
skip_without_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


@functools.cache
def operation(name: str) -> Operation:
    """An operation with its inputs, made once for all its variants."""
    torch.manual_seed(0)
    case = PointwiseCase(SHAPE, SIZES, torch.device("cuda"), torch.bfloat16, SETS, stream=torch.float32)
    return operations(case)[name]()


@functools.lru_cache(maxsize=1)  # for its memory
def attention_operation(shape: str) -> Operation:
    """Attention at one shape with its inputs, made once for all its variants."""
    torch.manual_seed(0)
    return attention.AttentionCase(
        ATTENTION_SHAPES[shape], SIZES, torch.device("cuda"), torch.bfloat16, SETS
    ).operation()


def run(measured: Operation, variant: str, mode: str, group: str, benchmark: Any) -> None:
    """Time one variant from a quiet device until it is quiet again, so launches count, as in eager training."""
    if variant not in measured.factories:
        pytest.skip("not measured at this shape")
    try:
        made: Variant = measured.factories[variant]()
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")
    except LeftOut as reason:
        pytest.skip(str(reason))
    call, rounds = getattr(made, mode), itertools.count()

    def timed() -> None:
        call(next(rounds))
        torch.cuda.synchronize()

    benchmark.group = group
    benchmark.pedantic(timed, setup=torch.cuda.synchronize, rounds=ROUNDS, warmup_rounds=WARM_UP, iterations=1)
    benchmark.extra_info["GB_per_second"] = measured.bytes[mode] / benchmark.stats.stats.median / 1e9
