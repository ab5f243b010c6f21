"""The rule for launch parameters: what holds of every launch, and what it leaves a thread."""

import pytest
import torch

from onepeace_fast.kernels.launch import stages
from onepeace_fast.kernels.launch_heuristic import KERNELS, WIDEST, WIDTHS, heuristic, widest, width_class
from onepeace_fast.kernels.launch_parameters import launch_parameters, use_launch_parameters

REGISTERS, THREADS = 65536, 32
LAUNCHES = [(kernel, width) for kernel in KERNELS for width in WIDTHS if width <= widest(kernel)]


def test_every_width_belongs_to_the_smallest_class_that_holds_it():
    assert WIDTHS[-1] == max(WIDEST.values()) and [*WIDTHS] == sorted(WIDTHS)
    for width in (1, *WIDTHS, *(most + 1 for most in WIDTHS[:-1])):
        assert width_class(width) == min(most for most in WIDTHS if most >= width)
        assert {heuristic(kernel, width).block_width for kernel in KERNELS} == {width_class(width)}


@pytest.mark.parametrize("kernel, width", LAUNCHES)
def test_a_launch_can_be_compiled_and_leaves_registers_for_what_it_holds(kernel, width):
    launch = heuristic(kernel, width)
    part, threads = width // launch.parts, THREADS * launch.num_warps
    assert part * launch.parts == width and part & (part - 1) == 0
    assert all(n & (n - 1) == 0 and n > 0 for n in (launch.block_rows, launch.num_warps))
    assert 4 <= launch.num_warps <= 16 and launch.programs_per_multiprocessor * launch.num_warps <= 32
    held = launch.block_rows * part // threads * launch.parts
    assert 1 <= held <= (24 if launch.parts > 1 else 16), "elements of a row tensor in a thread"
    assert threads * (launch.max_registers or 1) <= REGISTERS
    assert launch.block_rows == 1 or launch.parts == 1


def test_narrow_rows_share_a_program_and_wide_ones_take_more_warps():
    for kernel in KERNELS:
        launches = [heuristic(kernel, width) for width in WIDTHS if width <= widest(kernel)]
        rows, warps = ([getattr(one, name) for one in launches] for name in ("block_rows", "num_warps"))
        assert rows == sorted(rows, reverse=True) and rows[0] > 1 and rows[-1] == 1
        assert warps[:4] == sorted(warps[:4])


def test_backward_kernels_are_few_programs_since_each_leaves_sums_to_add_up():
    for kernel, width in LAUNCHES:
        if "backward" in kernel:
            assert heuristic(kernel, width).programs_per_multiprocessor <= 2
            assert heuristic(kernel, width).num_warps >= 8


def test_rows_are_copied_ahead_where_two_of_each_tensor_fit_into_every_multiprocessor():
    def of(kernel, width, *dtypes):
        return stages(heuristic(kernel, width), *[torch.empty(0, dtype=dtype) for dtype in dtypes])

    half, single = torch.bfloat16, torch.float32
    one_row = [width for width in WIDTHS if heuristic("layer_norm_backward", width).block_rows == 1]
    for width in WIDTHS:
        assert of("layer_norm_backward", width, half, half) == (3 if width in one_row else 1)
        assert of("gated_sub_ln_backward", width, half, half, half) == (3 if width in one_row else 1)
    assert one_row == [2048, 4096, 6144]
    assert of("gated_sub_ln_backward", 2048, single, single, single) == 3
    assert of("gated_sub_ln_backward", 6144, single, single, single) == 1
    assert of("layer_norm", 2048, half) == 3 and of("layer_norm", 2048, single) == 1
    assert stages(heuristic("gated_sub_ln_backward", 6144), torch.empty(0), torch.empty(0), None) == 3
    assert stages(heuristic("layer_norm", 2048)._replace(programs_per_multiprocessor=None), torch.empty(0)) == 1


def test_other_parameters_hold_inside_a_block_for_that_kernel_alone():
    mine = heuristic("layer_norm", 1024)._replace(num_warps=1)
    before = launch_parameters("layer_norm", "", 2, 1024)
    with use_launch_parameters("layer_norm", mine):
        assert launch_parameters("layer_norm", "", 2, 1024) == mine
        assert launch_parameters("residual", "", 2, 1024) == heuristic("residual", 1024)
    assert launch_parameters("layer_norm", "", 2, 1024) == before == heuristic("layer_norm", 1024)
