"""The kernels under ThreadSanitizer, which takes every CUDA thread for a thread and knows no order but barriers'."""

import re
import shutil

import pytest
import torch
from support import host_shim
from support.attention_cases import Batch, any_cls, lengths, mixed, series, windowed_grid
from support.attention_forms import FORMS, SEVERAL_TILES, Form
from support.contract import normal
from support.kernel_attention import WALKS, gradient_of
from support.plans import naive_layout, whole_rows

pytestmark = pytest.mark.slow
HEAD_SIZES = (32, 64, 96, 128)
# A batch, how its keys are walked, and the head sizes.
CASES = {
    "three modalities": (mixed, WALKS["whole"], HEAD_SIZES),
    "CLS in blocks": (lambda: any_cls([[(18, 9), (2, 1)], [(40, 20), (1, 17)]]), WALKS["whole"], HEAD_SIZES),
    "split keys": (lambda: lengths([40, 3], 2), WALKS["split"], HEAD_SIZES),
    "windows": (lambda: windowed_grid(120, "corners"), WALKS["whole"], (32,)),
    "windows, split keys": (lambda: windowed_grid(120, "rows"), WALKS["split"], (64,)),
    "rounds": (lambda: lengths([330]), {"max_length": 1}, HEAD_SIZES),
    "one block more": (lambda: lengths([129]), WALKS["whole"], (128,)),
    "two walks": (lambda: lengths([131]), WALKS["whole"], (128,)),
    "growing": (lambda: lengths([100]), WALKS["whole"], (32,)),
    "frozen": (lambda: lengths([3, 150, 3]), {"max_length": 1}, (128,)),
    "no samples": (
        lambda: Batch(naive_layout(whole_rows({"text": []}), capacity=3), (series(4, 2),)),
        WALKS["whole"],
        HEAD_SIZES,
    ),
}


def case(name: str, dim: int, orders: tuple[int, ...] = (0,)) -> bytes:
    """Forward and backward; gradients that grow from row to row make the fixed point coarser again and again."""
    batch, walk, _ = CASES[name]
    batch = batch()
    leaves = batch.leaves(1, dim, dtype=torch.bfloat16)
    given = batch.given(leaves) | walk
    grad = gradient_of(leaves["qkv"])
    if name == "growing":
        grad *= torch.exp2(torch.arange(len(grad)) / 8)[:, None, None]
    needs = [name != "frozen"] * len(batch.tables)
    gradients = host_shim.gradients_case(grad, needs, True, given.pop("multiprocessors", 1))
    return host_shim.attention_case(leaves["qkv"], **given, orders=orders, gradients=gradients)


RUNS = [(name, dim, "227 KiB") for name, (_, _, dims) in CASES.items() for dim in dims]
# Of the compact shape of the backward kernel.
COMPACT = ("three modalities", "CLS in blocks", "split keys", "two walks")
RUNS += [(name, dim, "99 KiB") for name in COMPACT for dim in HEAD_SIZES[1:]]


@pytest.mark.parametrize("name, dim, limit", RUNS)
def test_no_two_threads_touch_the_same_memory_unordered(build, tmp_path, name, dim, limit):
    given = case(name, dim, orders=(0,) if "windows" in name else (0, 1))
    process = host_shim.run(build("thread"), tmp_path, given, shared_limit=host_shim.SHARED_LIMITS[limit])
    assert process.returncode == 0, process.stderr[:4000]


# Of attention_forms.py, in both walks.
FORMS_OF_RACES = ("one vector for all, CLS", "prefix", "causal, runs", "keys of others", "keys of others in order, CLS")


def form_case(name: str, multiprocessors: int, sizes: tuple[int, int] = (32, 32)) -> bytes:
    """Forward and backward of a form."""
    form = Form(**FORMS[name] | {"sizes": sizes, "lengths": SEVERAL_TILES})
    leaves = {key: leaf.bfloat16() for key, leaf in form.leaves.items()}
    qkv = form.qkv(leaves)
    grad = normal(leaves["q"].shape[0], *leaves["v"].shape[1:], seed=1000, dtype=torch.bfloat16)
    scale = "head_scale" in leaves
    gradients = host_shim.gradients_case(grad, [True] * form.vectors, scale, multiprocessors, joint=form.joint)
    return host_shim.attention_case(qkv, **form.arguments(leaves), orders=(0, 1), gradients=gradients)


@pytest.mark.parametrize("multiprocessors", (1, 132))
@pytest.mark.parametrize("name", FORMS_OF_RACES)
def test_no_two_threads_of_the_other_kinds_do(build, tmp_path, name, multiprocessors):
    process = host_shim.run(build("thread"), tmp_path, form_case(name, multiprocessors))
    assert process.returncode == 0, process.stderr[:4000]


@pytest.mark.parametrize("limit", ("99 KiB", "227 KiB"))
@pytest.mark.parametrize("multiprocessors", (1, 132))
def test_no_two_threads_do_where_keys_are_wider_than_values(build, tmp_path, multiprocessors, limit):
    given = form_case(FORMS_OF_RACES[0], multiprocessors, (128, 64))
    process = host_shim.run(build("thread"), tmp_path, given, shared_limit=host_shim.SHARED_LIMITS[limit])
    assert process.returncode == 0, process.stderr[:4000]


FORWARD, WALK = "relative_bias_attention_forward.cu", "query_walk.cuh"
FORWARD_MEMORY = "forward_memory.cuh"
BACKWARD, MEMORY, SPREAD = "backward_kernel.cuh", "backward_memory.cuh", "spread_key_block.cuh"
ENTRY_SUMS = "entry_sums.cuh"
ROW_SUMS, SUMS, LAUNCHES = "backward_row_sums.cuh", "backward_sums.cuh", "relative_bias_attention_backward.cu"
COMPLETE = "    __syncwarp();  // the rows are complete"
# Where each barrier stands: a case that needs it, the file and the text in it that has the barrier.
BARRIERS = {
    "tile": ("three modalities", WALK, "            __syncthreads();  // this tile"),
    "codes of keys": ("three modalities", FORWARD_MEMORY, "        __syncwarp();  // the codes of keys"),
    "codes of queries": ("three modalities", FORWARD_MEMORY, "            __syncwarp();  // the codes of queries"),
    "window": ("windows", WALK, "        forward.load_window(vector, first, count);\n        __syncthreads();"),
    "orders of all queries": ("causal, runs", WALK, "        if (forward.has_order() || !has_keys) __syncthreads();"),
    "next window": ("windows", WALK, "        if (first > range.first) __syncthreads();"),
    "next queries": ("rounds", WALK, "        __syncthreads();  // the next queries"),
    "results": ("three modalities", FORWARD, "        __syncwarp();\n#pragma unroll 1"),
    "backward: tile": ("three modalities", BACKWARD, "        __syncthreads();  // this tile"),
    "backward: shares of sums": ("three modalities", BACKWARD, "        __syncthreads();  // all shares"),
    "backward: score gradient": ("three modalities", BACKWARD, "        __syncthreads();  // the scores' gradient"),
    "backward: keys": ("three modalities", BACKWARD, "    __syncthreads();  // nobody reads the keys"),
    "backward: next keys": ("two walks", BACKWARD, "    __syncthreads();  // the next keys"),
    "backward: sample": ("three modalities", BACKWARD, "        __syncthreads();  // everybody sees the sample"),
    "backward: next sample": ("frozen", BACKWARD, "        __syncthreads();  // nobody reads the sample"),
    "backward: no samples": ("no samples", BACKWARD, "    __syncthreads();  // without samples too"),
    "backward: blocks": ("three modalities", MEMORY, "        __syncthreads();  // every key block is known"),
    "backward: codes of a tile": ("three modalities", MEMORY, "        __syncwarp();  // all codes are there"),
    "backward: run of a key block": ("three modalities", MEMORY, "        __syncwarp();  // all lanes see it"),
    "backward: rows of keys": ("three modalities", MEMORY, f"    {COMPLETE}\n        const BlockRows"),
    "backward: rows of queries": ("three modalities", MEMORY, f"        {COMPLETE}"),
    "backward: next rows": ("one block more", MEMORY, "            __syncwarp();  // the next rows"),
    "backward: additions": ("rounds", ENTRY_SUMS, "    __syncthreads();  // every warp has added"),
    "backward: exponent": ("three modalities", ENTRY_SUMS, "    __syncthreads();  // nobody reads the exponent"),
    "backward: coarser": ("growing", ENTRY_SUMS, "        __syncthreads();  // everybody knows the exponent before"),
    "backward: columns": ("one block more", SPREAD, "            __syncwarp();  // the columns are complete"),
    "backward: row sums": ("split keys", ROW_SUMS, "        __syncwarp();  // lane 0"),
    "backward: row sums' sample": ("two walks", ROW_SUMS, "arguments, blockIdx.z);\n    __syncthreads();"),
    "backward: query sums' sample": ("split keys", SUMS, "arguments, blockIdx.z);\n    __syncthreads();"),
}


@pytest.mark.longest  # each compiles a kernel anew
@pytest.mark.parametrize("name", BARRIERS)
def test_a_deleted_barrier_is_named_by_its_line(build, tmp_path, name):
    batch, file, text = BARRIERS[name]
    csrc, dim = tmp_path / "csrc", CASES[batch][2][0] if batch in CASES else 32
    shutil.copytree(host_shim.CSRC, csrc)
    source = (csrc / file).read_text()
    assert source.count(text) == 1
    (csrc / file).write_text(source.replace(text, re.sub(r"__sync\w+\(\);", "(void)0;", text)))
    changed = FORWARD
    if name.startswith("backward"):
        changed = LAUNCHES if file in (ROW_SUMS, SUMS) else f"relative_bias_attention_backward_{dim}.cu"
    program = host_shim.build(tmp_path, "thread", csrc, changed, build("thread"))
    process = host_shim.run(program, tmp_path, case(batch, dim) if batch in CASES else form_case(batch, 1))
    barrier = source[: source.index(text)].count("\n") + 1 + text[: text.index("__sync")].count("\n")
    lines = {int(line) for line in re.findall(rf"{file}:(\d+)", process.stderr)}
    if name == "backward: blocks":  # rows that are not known yet are copied from an address that is none
        assert re.search("SEGV(.|\\n)*cp_async_wait_all(.|\\n)*walk_keys", process.stderr)
        return
    assert process.returncode and "data race" in process.stderr
    assert any(abs(line - barrier) <= 8 for line in lines), f"line {barrier}, named are {sorted(lines)}"
