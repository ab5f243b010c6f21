"""How a kernel over rows is launched on a GPU on which nothing was measured: a rule, with a reason at each choice.

No figure here depends on the architecture: every GPU since sm_80 has 65,536 registers a multiprocessor, and these
kernels take no more shared memory than each has. `make kernels` compiles every launch and refuses spills, narrow
accesses and loops that wait for the row that they have just asked for.
"""

from __future__ import annotations

from typing import NamedTuple

WIDTHS = (256, 512, 1024, 2048, 4096, 6144)  # the classes; a width belongs to the smallest that holds it
PART = 2048  # columns of a part, where rows are no power of two wide
THREADS = 32  # of a warp
MOST_REGISTERS = 255  # of a thread


class Parameters(NamedTuple):
    """How a kernel over rows is launched.

    ``block_rows`` rows of ``block_width`` columns are in registers at a time, in ``parts`` of a power of two of columns
    each, so that a class may be 6144 wide; a launch has at most ``programs_per_multiprocessor`` programs for each
    multiprocessor, and each walks over its share of the rows; None: a program for every block of rows.
    ``max_registers`` bounds a thread's registers, so that a multiprocessor holds more programs.
    """

    block_width: int
    block_rows: int
    num_warps: int
    programs_per_multiprocessor: int | None
    parts: int = 1
    max_registers: int | None = None


class Kernel(NamedTuple):
    """What the rule has to know of a kernel.

    A thread holds ``elements`` of a row tensor at a time. A program has at least ``fewest_warps``, and all programs of
    a multiprocessor have ``warps`` together: 32 leave a thread 64 registers, 16 leave it 128. It has at most ``rows``
    rows at a time.
    """

    elements: int
    fewest_warps: int
    warps: int
    rows: int = 16


# A forward kernel waits for memory: many small programs. 16 elements of half precision are two accesses of 16 bytes to
# each row tensor, enough to have under way. A scale for each head, or two row tensors and an activation, take more than
# 64 registers. A backward kernel leaves its sums over rows for another kernel to add up: few programs of 8 warps leave
# few of them, and its programs copy wide rows ahead into shared memory, since so few hide no wait. Where a norm
# is in it, it holds two to four row tensors and sums for two or three vectors: half as many elements of each.
KERNELS = {
    "layer_norm": Kernel(16, 4, 32),
    "layer_norm_head_scale": Kernel(16, 4, 16),
    "layer_norm_backward": Kernel(8, 8, 16),
    "layer_norm_backward_head_scale": Kernel(8, 8, 16),
    "rms_norm": Kernel(16, 4, 32),
    "rms_norm_backward": Kernel(8, 8, 16),
    "residual": Kernel(16, 4, 32),
    "residual_backward": Kernel(16, 8, 16),
    "residual_layer_norm": Kernel(16, 4, 32),
    "residual_layer_norm_backward": Kernel(8, 8, 16),
    "residual_rms_norm": Kernel(16, 4, 32),
    "residual_rms_norm_backward": Kernel(8, 8, 16),
    "gated_sub_ln": Kernel(16, 4, 16, rows=4),
    "gated_sub_ln_backward": Kernel(8, 8, 16),
}
# The widest rows that an operation's kernels hold in registers, beside the parameters and the sums over rows of its
# backward pass; the reference takes wider ones.
WIDEST = {"layer_norm": 6144, "rms_norm": 6144, "residual": 4096, "gated_sub_ln": 6144}


def widest(kernel: str) -> int:
    """The widest rows that a kernel is launched for."""
    return next(most for operation, most in WIDEST.items() if kernel.startswith(operation))


def width_class(width: int) -> int:
    """The smallest class that holds a width."""
    return min(most for most in WIDTHS if most >= width)


def heuristic(kernel: str, width: int) -> Parameters:
    """The launch of a kernel for rows of this width, in any dtype: registers hold float32 whatever is read."""
    form, columns = KERNELS[kernel], width_class(width)
    if columns & (columns - 1):
        return _in_parts(kernel, columns)
    # As many warps as a row needs, as a power of two; a narrow row leaves room for more rows.
    warps = min(form.warps, max(form.fewest_warps, columns // (THREADS * form.elements)))
    rows = min(form.rows, max(1, warps * THREADS * form.elements // columns))
    programs = max(1, form.warps // warps)
    return Parameters(columns, rows, warps, programs, max_registers=_bound(kernel, rows))


def _bound(kernel: str, rows: int) -> int | None:
    """Registers of a thread, where the compiler left alone gives too many for the programs, or spills to fit more."""
    if kernel in ("layer_norm_backward", "rms_norm_backward"):
        return 128
    if kernel == "residual_rms_norm" and rows > 1:
        return 96
    if kernel in ("residual_backward", "residual_layer_norm_backward") and rows > 1:
        return MOST_REGISTERS
    return 128 if kernel in ("gated_sub_ln", "layer_norm") and rows == 1 else None


def _in_parts(kernel: str, columns: int) -> Parameters:
    """8 warps hold 8 elements of a part for each thread; a backward kernel fills a multiprocessor alone."""
    programs = 2 if KERNELS[kernel].fewest_warps < 8 else 1
    bound = 128 if kernel == "gated_sub_ln" else MOST_REGISTERS
    return Parameters(columns, 1, 8, programs, columns // PART, bound)
