"""The kernels under ThreadSanitizer, which takes every CUDA thread for a thread and knows no order but barriers'."""

import re
import shutil

import pytest
import torch
from support import host_shim
from support.attention_cases import any_cls, lengths, mixed, windowed_grid
from support.kernel_attention import arguments, rounded

pytestmark = pytest.mark.slow
FORWARD = "relative_bias_attention_forward.cu"
BATCHES = {
    "three modalities": mixed,
    "CLS in blocks": lambda: any_cls([[(18, 9), (2, 1)], [(40, 20), (1, 17)]]),
    "windows": lambda: windowed_grid(64, "corners"),
    "rounds": lambda: lengths([330]),
}


def case(name: str, dim: int = 32) -> bytes:
    batch = BATCHES[name]()
    leaves = rounded(batch, torch.bfloat16, 1, dim)
    hints = {"max_length": 1} if name == "rounds" else {}
    return host_shim.attention_case(leaves["qkv"], **{**arguments(batch, leaves), **hints}, orders=(0, 1))


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("dim", (32, 64, 128))
def test_no_two_threads_touch_the_same_memory_unordered(build, tmp_path, name, dim):
    process = host_shim.run(build("thread"), tmp_path, case(name, dim))
    assert process.returncode == 0, process.stderr[:4000]


# Where each barrier stands: the text that ends with it.
BARRIERS = {
    "tile": ("three modalities", "            __syncthreads();  // this tile"),
    "window": ("windows", "        forward.load_window(modality, first, count);\n        __syncthreads();"),
    "next window": ("windows", "        if (first > range.first) __syncthreads();"),
    "next queries": ("rounds", "        __syncthreads();  // the next queries"),
    "results": ("three modalities", "        __syncwarp();\n#pragma unroll 1"),
}


@pytest.mark.parametrize("name", BARRIERS)
def test_a_deleted_barrier_is_named_by_its_line(tmp_path, name):
    batch, text = BARRIERS[name]
    csrc = tmp_path / "csrc"
    shutil.copytree(host_shim.CSRC, csrc)
    source = (csrc / FORWARD).read_text()
    assert source.count(text) == 1
    without = re.sub(r"__sync\w+\(\);", "(void)0;", text)
    (csrc / FORWARD).write_text(source.replace(text, without))
    process = host_shim.run(host_shim.build(tmp_path, "thread", csrc), tmp_path, case(batch))
    barrier = source[: source.index(text)].count("\n") + 1 + text[: text.index("__sync")].count("\n")
    lines = {int(line) for line in re.findall(rf"{FORWARD}:(\d+)", process.stderr)}
    assert process.returncode and "data race" in process.stderr
    assert any(abs(line - barrier) <= 8 for line in lines), f"line {barrier}, named are {sorted(lines)}"
