"""The model on code that is compiled here: a pipeline that Triton left out is found, and the command runs."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton's interpreter compiles nothing"),
]
ROOT = Path(__file__).resolve().parent.parent


def compiled(barrier: bool, gpu: str):
    """A product of one tile in three stages, with or without a barrier among its steps."""
    from support import planted

    from onepeace_fast.kernels.launch import Configuration
    from tools.kernel_model.compiled import compile_launch
    from tools.kernel_model.launches import Launch

    x, w, y = (torch.empty(128, columns, dtype=torch.bfloat16) for columns in (512, 512, 128))
    arguments = {"x": x, "w": w, "y": y, "rows": 128, "inner": 512, "columns": 128}
    constants = {"BARRIER": barrier, "BLOCK_ROWS": 128, "BLOCK_COLUMNS": 128, "BLOCK_INNER": 64}
    configuration = Configuration(planted.multiply_in_steps, arguments, constants, 8, num_stages=3, grid=(1,))
    return compile_launch(Launch("planted", configuration), "planted", gpu)


@pytest.mark.parametrize("gpu, buffers", [("sm_90", (3, 3)), ("sm_80", (2, 2))])
def test_a_barrier_that_leaves_one_buffer_is_found(gpu, buffers):
    sound, planted = (compiled(barrier, gpu) for barrier in (False, True))
    assert sound.faults == () and sound.buffers == buffers and sound.outstanding > 0
    assert planted.faults[0] == f"pipeline: 1 buffer of an operand, not {buffers[0]}, for 3 stages"
    assert planted.buffers == () and not planted.outstanding and planted.shared < sound.shared


def test_the_command_prints_every_launch_and_strategy_of_a_shape():
    command = [sys.executable, "-m", "tools.kernel_model", "--gpu", "H100", "--rows", "300", "--width", "256"]
    result = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    heading = lines.index("H100: strategies")
    assert [line.split("  ")[0] for line in lines[heading + 2 : heading + 5]] == ["fused", "per modality", "hybrid"]
    kernels = {line.split()[1] for line in lines if line.startswith("routed_ffn: ")}
    assert {"routed_ffn_hidden", "routed_ffn_hidden_gradient", "grouped_gradients"} < kernels
    assert lines[-1].startswith("A model of the compiled kernels, not a measurement: 0 faults")


def test_every_product_that_a_layer_launches_is_known_to_the_model():
    from tools.kernel_model.estimate import OF_KERNEL
    from tools.kernel_model.launches import Shape, recorded

    launches = recorded(Shape((300, 5), 256, 512), "sm_90").values()
    products = {launch.kernel for launch in launches if "BLOCK_INNER" in launch.configuration.constants}
    assert products == set(OF_KERNEL)


def test_a_launch_moves_each_of_its_tensors_once():
    from tools.kernel_model.launches import Shape, recorded

    rows, width, hidden = 512, 256, 1024
    launches = recorded(Shape((400, 112), width, hidden), "sm_90")
    row, wide, weight, statistics = 2 * rows * width, 2 * rows * hidden, 2 * 2 * width * hidden, 4 * rows
    offsets, vector = 4 * 3, 2 * hidden
    (programs,) = launches["layer_norm_and_stream: layer_norm_backward"].configuration.grid
    expected = {
        "gated_sub_ln: gated_sub_ln_forward": 3 * wide + 2 * statistics + 2 * 2 * vector + offsets,
        "layer_norm: layer_norm_forward": 2 * row + 2 * statistics + 2 * 2 * width,
        "residual: residual_forward": 3 * row + 2 * width,
        # du, dv and hhat, z, dz and dy, W0, W1, W2 and their gradients, the norm's, db2, and sums of 2 row tiles.
        "routed_ffn: grouped_gradients": 3 * wide + 3 * row + 6 * weight + 2 * 2 * vector + 2 * 4 * width
        + 2 * 2 * 2 * 4 * hidden + offsets,
        # dn is never there: dy, u, v, du, dv, hhat, W2, the norm's weights, four statistics.
        "hybrid: routed_ffn_hidden_gradient": row + 5 * wide + weight + 2 * vector + 4 * statistics + offsets,
        # Of one modality: Ghat, which gives way to dW2, and W2, the norm's, db2, and sums of 8 row tiles.
        "hybrid: routed_ffn_norm_gradient": 3 * weight // 2 + 2 * vector + 4 * width + 2 * 8 * 4 * hidden,
        "layer_norm_and_stream: layer_norm_backward": 4 * row + 2 * statistics + 2 * width + 2 * 4 * programs * width,
    }  # fmt: skip
    assert {name: launches[name].traffic for name in expected} == expected
