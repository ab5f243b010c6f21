"""The binding of attention's CUDA kernels, compiled by g++: what it launches on addresses, and what it refuses."""

import ctypes
import functools

import pytest
import torch
from support.attention_cases import text_only
from support.contract import normal

from onepeace_fast.attention_structures import AttentionInputs, BiasVectors, KeySegments
from onepeace_fast.ops import attention_on_gpu
from tools.compile_cuda import PLAN_ARGUMENTS, ForwardPlan

ROW = {"device": 0, "samples": 1, "heads": 1, "head_dim": 32, "value_dim": 32}


class Call:
    """Both passes on one row of one head without a bias; ``changes`` override what they are called with."""

    def __init__(self, extension, **changes):
        plan = {"cu_seqlens": torch.tensor([[0, 1]], dtype=torch.int32), "code": torch.zeros(1, dtype=torch.int32)}
        self.tensors = plan | {"is_cls": torch.zeros(1, dtype=torch.bool)}
        segments = {"rows": 1, "modalities": 1, "max_length": 1}
        segments |= {name: tensor.data_ptr() for name, tensor in self.tensors.items()} | {"order": 0}
        self.tensors["qkv"] = normal(1, 3, 1, 32, seed=0, dtype=torch.float16)
        kinds = {"type": "float16", "head_scale": 0, "head_scale_type": "float32"}
        values = {**ROW, **kinds, "scale": 1.0, "bias": []}
        for side in ("queries", "keys"):
            values[side] = (*(changes.pop(f"{side}.{name}", value) for name, value in segments.items()),)
        for name, x in zip("qkv", self.tensors["qkv"].unbind(1), strict=True):
            matrix = {"data": x.data_ptr(), "row_stride": 96, "head_stride": 32}
            values[name] = (*(changes.pop(f"{name}.{part}", value) for part, value in matrix.items()),)
        values |= changes
        self.attention, self.vectors = extension.RelativeBiasAttention(**values), len(values["bias"])

    def forward(self, **changes):
        """out and the log-sum-exp."""
        out, log_sum_exp = torch.full((1, 1, 32), torch.nan).half(), torch.full((1, 1), torch.nan)
        values = {"out": out.data_ptr(), "log_sum_exp": log_sum_exp.data_ptr(), "stream": 0}
        self.launch("forward", out, **{**values, **changes})
        return out, log_sum_exp

    def backward(self, gradient, log_sum_exp, **changes):
        """The gradient of qkv, from that of out."""
        wanted = {"multiprocessors": 1, "bias": [16] * self.vectors, "head_scale": 0}
        qkv = torch.full_like(self.tensors["qkv"], torch.nan)
        workspace = torch.empty(self.attention.backward_workspace(**wanted) + 16, dtype=torch.uint8)
        values = {"grad": gradient.data_ptr(), "grad_strides": (32, 32), "log_sum_exp": log_sum_exp.data_ptr()}
        values |= {"workspace": workspace.data_ptr(), "stream": 0}
        values |= {name: (x.data_ptr(), 96) for name, x in zip("qkv", qkv.unbind(1), strict=True)}
        self.launch("backward", qkv, **{**wanted, **values, **changes})
        return qkv

    def launch(self, name, result, **values):
        try:
            getattr(self.attention, name)(**values)
        except Exception:
            assert result.isnan().all(), "a refused call left a result"
            raise


def test_it_launches_on_addresses(host_extension):
    call = Call(host_extension)
    out, log_sum_exp = call.forward()
    q, k, v = call.tensors["qkv"][0, :, 0].float()
    assert torch.equal(out[0, 0].float(), v)  # a sample of one row attends to itself
    torch.testing.assert_close(log_sum_exp[0, 0], q @ k, rtol=1e-3, atol=1e-3)
    grad = normal(1, 1, 32, seed=1, dtype=torch.float16)
    dq, dk, dv = call.backward(grad, log_sum_exp)[0, :, 0].float()
    torch.testing.assert_close(dv, grad[0, 0].float(), rtol=1e-3, atol=1e-3)
    assert dq.abs().max() < 0.05 and dk.abs().max() < 0.05  # softmax over one key has no slope


VECTOR = (16, "float32", 4, 1, 4, 0)
ADDRESS = "expected an address that 16 divides, got one that is 8 modulo 16"
# What is said, by what the arguments of both passes are changed to.
REFUSED = {
    "type: expected float16, bfloat16 or float32, got int8": {"type": "int8"},
    "type: expected float16, bfloat16 or float32, got float64": {"head_scale_type": "float64"},
    "qkv: expected float16 or bfloat16, got float32": {"type": "float32"},
    "qkv: expected a head size of 32, 64, 96 or 128, got 48": {"head_dim": 48},
    "v: expected values of the keys' 32, or of 64 beside 128, got 64": {"value_dim": 64},
    "v: expected values of the keys' 128, or of 64 beside 128, got 32": {"head_dim": 128},
    **{f"{name}: {ADDRESS}": {f"{name}.data": 8} for name in "qkv"},
    **{f"{name}: expected strides that 8 divides, got 97": {f"{name}.row_stride": 97} for name in "qkv"},
    **{f"{name}: expected strides that 8 divides, got 33": {f"{name}.head_stride": 33} for name in "qkv"},
    "qkv: expected no negative size and at least one head, got": {"heads": 0},
    "qkv: expected no negative size and at least one head, got 1 samples, -1 rows": {"keys.rows": -1},
    "cu_seqlens: expected 1 to 16 modalities, got 17": {"queries.modalities": 17},
    "cu_seqlens: expected 1 to 16 modalities, got 0": {"keys.modalities": 0},
    "order: expected that of queries and of keys, or none, got one of them": {"keys.order": 16},
    "cu_seqlens: expected at most 65534 samples and 65535 heads in one launch, got 65535 and": {"samples": 65_535},
    "bias: expected float16, bfloat16 or float32 [heads, 4 or more], got": {"bias": [(*VECTOR[:4], 3, 0)]},
    "bias: expected one vector for each of 1 modalities, one for all, or none, got 2": {"bias": [VECTOR] * 2},
    "bias: expected at most 16 vectors, got 17": {"bias": [VECTOR] * 17},
}
GRADIENTS_REFUSED = {
    f"grad: {ADDRESS}": {"grad": 8},
    "grad: expected strides that 8 divides, got 33": {"grad_strides": (33, 32)},
    "grad: expected strides that 8 divides, got 36": {"grad_strides": (32, 36)},
    **{f"gradient of {name}: {ADDRESS}": {name: (8, 96)} for name in "qkv"},
    **{f"gradient of {name}: expected strides that 8 divides, got 97": {name: (16, 97)} for name in "qkv"},
    f"workspace: {ADDRESS}": {"workspace": 8},
    "bias: expected a gradient for each of 0 vectors, 0 where it is frozen, got 1": {"bias": [16]},
    "head_scale: expected 0, since there is no head scale, got a gradient": {"head_scale": 16},
}


def refused_in_one_line(line, run, **changes):
    message = ""
    try:
        run(**changes)
    except (RuntimeError, ValueError) as error:
        message = str(error)
    assert message.startswith(line) and "\n" not in message


@pytest.mark.parametrize("line", REFUSED)
def test_both_passes_refuse_in_one_line_and_launch_nothing(host_extension, line):
    bad = REFUSED[line]
    grad, log_sum_exp = torch.zeros(1, 1, 32).half(), torch.zeros(1, 1)
    refused_in_one_line(line, lambda: Call(host_extension, **bad).forward())
    refused_in_one_line(line, lambda: Call(host_extension, **bad).backward(grad, log_sum_exp))


@pytest.mark.parametrize("line", GRADIENTS_REFUSED)
def test_the_backward_pass_refuses_in_one_line_and_launches_nothing(host_extension, line):
    call = Call(host_extension)
    _, log_sum_exp = call.forward()
    grad = torch.zeros(1, 1, 32).half()
    refused_in_one_line(line, lambda **bad: call.backward(grad, log_sum_exp, **bad), **GRADIENTS_REFUSED[line])


def test_the_forward_pass_and_cuda_refuse_in_one_line_and_launch_nothing(host_extension, monkeypatch):
    call = Call(host_extension)
    refused_in_one_line(f"out: {ADDRESS}", call.forward, out=8)
    out, log_sum_exp = call.forward()
    monkeypatch.setenv("HOST_SHIM_SHARED_LIMIT", str(48 * 1024))
    line = "relative_bias_attention: CUDA refuses the launch: invalid argument"
    refused_in_one_line(line, call.backward, gradient=out, log_sum_exp=log_sum_exp)


def test_the_workspace_grows_with_what_is_learned(host_extension):
    call = Call(host_extension, bias=[VECTOR], head_scale=16)
    size = lambda *learned: call.attention.backward_workspace(  # noqa: E731
        multiprocessors=1, bias=[learned[0]], head_scale=learned[1]
    )
    assert size(0, 0) < size(0, 16) < size(16, 16) and size(0, 0) < size(16, 0)
    for bad in ([], [0, 0]):
        line = f"bias: expected a gradient for each of 1 vectors, 0 where it is frozen, got {len(bad)}"
        run = call.attention.backward_workspace
        refused_in_one_line(line, run, multiprocessors=1, bias=bad, head_scale=0)


def test_a_longest_length_beyond_all_rows_changes_nothing(host_extension):
    grad = normal(1, 1, 32, seed=1, dtype=torch.float16)
    results = []
    for length in (1, 2**31 - 1):
        call = Call(host_extension, **{"queries.max_length": length, "keys.max_length": length})
        out, log_sum_exp = call.forward()
        results.append((out, log_sum_exp, call.backward(grad, log_sum_exp)))
    assert all(map(torch.equal, *results))


# Bytes of a thread block, by head sizes and KiB that the device gives: without vectors, and with 2000 entries.
NEEDED = {
    (32, 32, 99): (72576, 101184),
    (64, 64, 99): (73344, 101184),
    (96, 96, 99): (84992, 101120),
    (128, 64, 99): (84992, 101120),
    (128, 128, 99): (88576, 100864),
    (64, 64, 163): (115584, 166464),
    (96, 96, 163): (99968, 166208),
    (128, 64, 163): (99968, 166208),
    (128, 128, 163): (126592, 166720),
    (64, 64, 227): (115584, 231744),
    (96, 96, 227): (99968, 219968),
    (128, 64, 227): (99968, 219968),
    (128, 128, 227): (126592, 232000),
}


def forward_plan(extension, head_dim, value_dim, entries, limit):
    """For entries without those of CLS, and the bytes that a device gives a thread block."""
    function = ctypes.CDLL(extension.__file__).relative_bias_attention_forward_plan
    function.restype, function.argtypes = ForwardPlan, PLAN_ARGUMENTS
    return function(head_dim, value_dim, entries, limit)


with_sizes = pytest.mark.parametrize(("head_dim", "value_dim", "limit"), NEEDED)


@with_sizes
def test_shared_memory_is_what_both_passes_take_and_what_the_device_gives(
    host_extension, monkeypatch, head_dim, value_dim, limit
):
    monkeypatch.setenv("HOST_SHIM_SHARED_LIMIT", str(limit * 1024))
    asked = {"device": 0, "head_dim": head_dim, "value_dim": value_dim}
    needed = lambda *entries: host_extension.shared_memory(**asked, entries=entries)  # noqa: E731
    plain, biased = NEEDED[head_dim, value_dim, limit]
    assert needed() == (plain, limit * 1024) and needed(1500, 500) == (biased, limit * 1024)
    assert needed(1 << 20)[0] <= limit * 1024


@with_sizes
def test_the_forward_pass_holds_vectors_whole_where_one_thread_block_does(host_extension, head_dim, value_dim, limit):
    """Its larger shape takes those of which a multiprocessor holds two thread blocks, its compact one all others."""
    plan = functools.partial(forward_plan, host_extension, head_dim, value_dim, limit=limit * 1024)
    windows = plan(1 << 20)
    without = windows.launch.shared_bytes - 4 * windows.bias_capacity
    most = (limit * 1024 - without) // 4
    assert (windows.is_compact, windows.is_large, windows.bias_capacity) == (1, 1, most)
    whole = plan(most)
    assert (whole.is_compact, whole.is_large, whole.bias_capacity) == (1, 0, most)
    assert plan(most + 1).is_large and whole.launch.shared_bytes == windows.launch.shared_bytes
    assert whole.launch.thread_blocks_at_once == windows.launch.thread_blocks_at_once == 1


@with_sizes
def test_the_larger_shape_is_that_of_which_a_multiprocessor_holds_two(host_extension, head_dim, value_dim, limit):
    """It has a KiB more than a thread block may have, and the system takes one for each."""
    plan = functools.partial(forward_plan, host_extension, head_dim, value_dim, limit=limit * 1024)
    fitting = forward_plan(host_extension, head_dim, value_dim, 0, limit=1 << 20).launch
    each = (limit + 1) * 1024 // 2 - 1024
    most = (each - fitting.shared_bytes) // 4
    assert fitting.thread_blocks_at_once == 2
    if most < 0:
        assert plan(0).is_compact
    else:
        assert not plan(most).is_compact and plan(most).launch.shared_bytes == fitting.shared_bytes + 4 * most
        assert plan(most + 1).is_compact and not plan(most + 1).is_large


def test_a_device_that_gives_too_little_is_known_before_a_launch(host_extension, monkeypatch):
    monkeypatch.setenv("HOST_SHIM_SHARED_LIMIT", str(75 * 1024))
    fits = {}
    for head_dim in (32, 64, 96, 128):
        needed, limit = host_extension.shared_memory(device=0, head_dim=head_dim, value_dim=head_dim, entries=[])
        fits[head_dim] = needed <= limit
    assert fits == {32: True, 64: True, 96: False, 128: False}


@pytest.mark.parametrize("sizes, filled", {(128, 64): 64, (120, 40): 64, (128, 72): 128, (96, 64): 96}.items(), ids=str)
def test_values_of_64_beside_keys_of_128_are_not_filled_up(sizes, filled):
    q, k, v = (torch.zeros(2, 1, size, dtype=torch.bfloat16) for size in (sizes[0], *sizes))
    given = AttentionInputs(None, q, k, v, None, KeySegments(), BiasVectors([], ()), None, 1.0)
    assert [x.shape[2] for x in attention_on_gpu._apart(given)][2] == filled


def test_launches_make_the_tensors_device_the_current_one_and_leave_the_rest_to_torch_s_guard(kernel, monkeypatch):
    """What was the current device is never set again by the kernels: that would create a context on it."""
    current = ctypes.c_int.in_dll(ctypes.CDLL(kernel.__file__), "host_shim_device")
    guarded = []

    class Guard:
        def __init__(self, tensor):
            self.tensor = tensor

        def __enter__(self):
            current.value = 5

        def __exit__(self, *error):
            guarded.append((self.tensor, current.value))

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    leaves = text_only().leaves(2, 32, dtype=torch.bfloat16)
    qkv = leaves["qkv"].requires_grad_()
    text_only().call(**leaves).sum().backward()
    assert [value for _, value in guarded] == [qkv.get_device()] * 2
    assert all(tensor.data_ptr() == qkv.data_ptr() for tensor, _ in guarded)
