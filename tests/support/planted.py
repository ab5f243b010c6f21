"""Kernels with a fault each, for the check of compiled kernels; imported where Triton is."""

import triton
import triton.language as tl


@triton.jit
def copy(x, y, START: tl.constexpr):
    """Copy a row of 1024; from a START that is odd Triton cannot read 16 bytes at once."""
    cell = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    tl.store(y + cell, tl.load(x + START + cell))


@triton.jit
def hold(x, y, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Hold more in registers than there are."""
    cell = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    value = tl.load(x + cell)
    tl.store(y + cell, value / tl.sum(value, 1)[:, None])


@triton.jit
def transpose(x, y, SIZE: tl.constexpr):
    """Transpose a matrix in one program, through shared memory."""
    cell = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(y + cell, tl.trans(tl.load(x + cell)))


@triton.jit
def copy_twice(x, y, ROWS: tl.constexpr):
    """Copy rows of 64, read the first row again for each of them, and leave out the last element of each."""
    column = tl.arange(0, 64)
    for row in tl.static_range(ROWS):
        first = tl.load(x + column, mask=column < 63)
        value = tl.load(x + row * 64 + column, mask=column < 63)
        tl.store(y + row * 64 + column, value + 0 * first, mask=column < 63)


@triton.jit
def copy_rows(x, y, ROWS: tl.constexpr, STAGES: tl.constexpr, REALLY: tl.constexpr):
    """Copy rows of 1024 in so many stages, or REALLY in others: two have one buffer, one has none."""
    for row in tl.range(0, ROWS, num_stages=REALLY):
        cell = row * 1024 + tl.arange(0, 1024)
        tl.store(y + cell, tl.load(x + cell) + 1)


@triton.jit
def multiply(x, y, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """Multiply a square matrix by itself, read by pointers; in full float32 that is not for the tensor cores."""
    cell = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    value = tl.load(x + cell)
    tl.store(y + cell, tl.dot(value, value, input_precision=PRECISION))


@triton.jit
def multiply_and_add(x, y, SIZE: tl.constexpr, STEPS: tl.constexpr, READ: tl.constexpr):
    """Add up products of a matrix's blocks with themselves; to READ the sum waits for each before the next begins."""
    rows = tl.make_tensor_descriptor(x, [SIZE, SIZE * STEPS], [SIZE * STEPS, 1], [SIZE, SIZE])
    total = tl.zeros((SIZE, SIZE), dtype=tl.float32)
    for k in range(0, SIZE * STEPS, SIZE):
        block = rows.load([0, k])
        total = tl.dot(block, block.T, total, input_precision="tf32")
        if READ:
            total = total * 2
    cell = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(y + cell, total)


@triton.jit
def multiply_in_steps(
    x, w, y, rows, inner, columns, BARRIER: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """One tile of x W^T by descriptors, step by step; a barrier among the steps stops Triton's pipeline."""
    x_rows = tl.make_tensor_descriptor(x, [rows, inner], [inner, 1], [BLOCK_ROWS, BLOCK_INNER])
    w_rows = tl.make_tensor_descriptor(w, [columns, inner], [inner, 1], [BLOCK_COLUMNS, BLOCK_INNER])
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for k in range(0, inner, BLOCK_INNER):
        part = x_rows.load([0, k])
        if BARRIER:
            tl.debug_barrier()
        total = tl.dot(part, w_rows.load([0, k]).T, total)
    y_rows = tl.make_tensor_descriptor(y, [rows, columns], [columns, 1], [BLOCK_ROWS, BLOCK_COLUMNS])
    y_rows.store([0, 0], total.to(y.dtype.element_ty))
