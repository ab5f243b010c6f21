"""How ``relative_bias_attention`` runs on a GPU: by the CUDA kernels, and by PyTorch's attention where it cannot.

Here both run on the CPU: the kernels' own source and their binding compiled by g++, PyTorch's attention as it is.
"""

import ctypes
import dataclasses
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from support import contract
from support.attention_cases import Batch, kept_grid, kept_text, mixed, series, text_only
from support.host_extension import ARCHITECTURES, force_gpu_paths, use
from support.plans import naive_layout, whole_rows

from onepeace_fast import cuda_extension, relative_bias_attention
from onepeace_fast.hardware import selftest
from onepeace_fast.hardware.cases import random_tensors, specified_cases
from onepeace_fast.ops import attention_on_gpu, segments
from onepeace_fast.ops.relative_bias_attention import _say_once
from onepeace_fast.structures import AttentionInputs, RelativeBias, Segments
from onepeace_fast.tolerance import DTYPES, HALF, assert_within_rule

BATCHES = {"text": text_only, "kept text": kept_text, "kept grid": kept_grid, "mixed": mixed}
PATHS = ("slower_path", pytest.param("kernel", marks=pytest.mark.requires_compiler))


@pytest.fixture
def kernel(monkeypatch, host_extension):
    """The kernel runs; a slower path would be heard."""
    use(monkeypatch, host_extension)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield host_extension


@pytest.fixture
def slower_path(monkeypatch):
    """No extension is there."""
    force_gpu_paths(monkeypatch)
    monkeypatch.setattr(cuda_extension, "unavailable_reason", lambda: "there is no extension")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


@pytest.mark.requires_compiler
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_the_kernel_follows_the_dense_bias(kernel, name, dtype):
    batch = BATCHES[name]()
    contract.check_against_naive(batch.call, batch.plain, batch.leaves(2, 32), dtype, batch.slices())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_the_slower_path_follows_the_dense_bias(slower_path, name, dtype):
    batch = BATCHES[name]()
    contract.check_against_naive(batch.call, batch.plain, batch.leaves(2, 8), dtype, batch.slices())


@pytest.mark.parametrize("bias, head_scale", [(False, False), (True, False), (False, True)])
def test_bias_and_head_scale_are_optional_on_the_slower_path(slower_path, bias, head_scale):
    batch = mixed()
    leaves = batch.leaves(3, 8, bias, head_scale)
    contract.check_against_naive(batch.call, batch.plain, leaves, torch.bfloat16, batch.slices(3))


@pytest.mark.requires_compiler
@pytest.mark.parametrize("bias, head_scale", [(False, False), (True, False), (False, True)])
def test_bias_and_head_scale_are_optional_for_the_kernel(kernel, bias, head_scale):
    batch = mixed()
    leaves = batch.leaves(3, 64, bias, head_scale)
    contract.check_against_naive(batch.call, batch.plain, leaves, torch.bfloat16, batch.slices(3))


@pytest.mark.requires_compiler
def test_parameters_keep_their_own_dtype_and_the_scale_is_the_caller_s(kernel):
    batch = Batch(text_only().layout, text_only().tables, 0.3)
    leaves = batch.leaves(2, 32)
    for dtype in DTYPES:
        dtypes = {name: torch.bfloat16 if name == "qkv" else dtype for name in leaves}
        contract.check_against_naive(batch.call, batch.plain, leaves, dtypes, batch.slices())
    half = {"qkv": leaves.pop("qkv").half()}
    single = {name: leaf.float() for name, leaf in leaves.items()}
    double = {name: leaf.double() for name, leaf in single.items()}
    assert torch.equal(batch.call(**half, **double), batch.call(**half, **single))


def test_the_slower_path_takes_the_caller_s_scale(slower_path):
    batch = Batch(text_only().layout, text_only().tables, 0.1)
    contract.check_against_naive(batch.call, batch.plain, batch.leaves(2, 32), torch.float32, batch.slices())


@pytest.mark.parametrize("path", PATHS)
def test_the_selftest_tells_what_the_kernels_compute_from_what_they_do_not(path, request):
    request.getfixturevalue(path)
    make = lambda: random_tensors(torch.device("cpu"), 0)  # noqa: E731
    cases = [list(specified_cases(20, torch.bfloat16, make(), torch.device("cpu")))[1] for _ in range(2)]
    rows = list(selftest.compare_case(*cases, torch.bfloat16))
    assert {row.operation for row in rows} == {"relative_bias_attention"} and all(row.kept for row in rows)
    assert {row.tensor.split()[0] for row in rows} == {"out0", *cases[0].leaves}
    assert all(row.by_kernel == (path != "slower_path") for row in rows)


@pytest.mark.parametrize("path", PATHS)
def test_the_backward_pass_runs_where_the_forward_pass_ran(path, request):
    request.getfixturevalue(path)
    batch = text_only()
    qkv = batch.leaves(2, 32)["qkv"].half().requires_grad_()
    launched = [cuda_extension.launched()]
    out = batch.call(qkv)
    launched.append(cuda_extension.launched())
    out.sum().backward()
    launched.append(cuda_extension.launched())
    assert [count - launched[0] for count in launched] == ([0, 0, 0] if path == "slower_path" else [0, 1, 2])


@pytest.mark.requires_compiler
def test_the_plan_s_tensors_and_parameters_may_have_any_strides(kernel):
    batch = mixed()
    leaves = {name: leaf.bfloat16() for name, leaf in batch.leaves(2, 32).items()}
    expected = batch.call(**leaves)
    plan = batch.arguments
    plan |= {name: plan[name].repeat_interleave(2, -1)[..., ::2] for name in ("cu_seqlens", "code", "is_cls")}
    assert not any(plan[name].is_contiguous() for name in ("cu_seqlens", "code", "is_cls"))
    assert torch.equal(batch.call(**{**leaves, "head_scale": contract.stepped(leaves["head_scale"])}), expected)


@pytest.mark.requires_compiler
def test_a_part_of_a_larger_projection_is_read_in_place(kernel):
    batch = mixed()
    leaves = {name: leaf.bfloat16() for name, leaf in batch.leaves(2, 32).items()}
    rows = batch.layout.capacity
    projection = torch.full((rows, 8 + 192 + 16), torch.nan, dtype=torch.bfloat16)
    projection[:, 8:-16] = leaves["qkv"].flatten(1)
    part = projection[:, 8:-16].view(rows, 3, 2, 32)
    assert torch.equal(batch.call(**{**leaves, "qkv": part}), batch.call(**leaves))


@pytest.mark.requires_compiler
def test_the_log_sum_exp_is_pytorchs_and_inert_rows_are_zero(kernel):
    batch = dataclasses.replace(mixed(), scale=0.2)
    leaves = batch.leaves(2, 32)
    plan = batch.arguments
    bias = [leaves[f"table{m}"][table.entries].t().float() for m, table in enumerate(batch.tables)]
    bias = RelativeBias(bias, tuple(table.offset for table in batch.tables))
    segments = Segments(*(plan[name] for name in Segments._fields))
    qkv, head_scale = leaves["qkv"].half(), leaves["head_scale"].float()
    out, total = attention_on_gpu.launch_forward(AttentionInputs(qkv, segments, bias, head_scale, 0.2))
    rounded = {name: leaf.half() if name == "qkv" else leaf.float() for name, leaf in leaves.items()}
    plain, exact = (
        batch.log_sum_exp(**{name: leaf.to(dtype) for name, leaf in rounded.items()})
        for dtype in (torch.float32, torch.float64)
    )
    assert_within_rule("log_sum_exp", total, plain, exact, [(..., head) for head in range(2)])
    inert = slice(len(batch.layout.tokens), None)
    assert not out[inert].any() and not total[inert].any() and len(out[inert])


@pytest.mark.parametrize("path", PATHS)
def test_registration_and_compilation(path, request):
    request.getfixturevalue(path)
    batch = text_only()
    batch.arguments  # noqa: B018 (made outside the graph)
    leaves = {name: leaf.bfloat16() for name, leaf in batch.leaves(2, 32).items()}
    contract.check_registration(batch.call, leaves, "relative_bias_attention")
    contract.check_compiled(batch.call, leaves)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("lengths", ([0, 3], [0], []), ids=str)
def test_samples_without_tokens(path, lengths, request):
    request.getfixturevalue(path)
    batch = Batch(naive_layout(whole_rows({"text": lengths})), (series(4, 5),))
    contract.check_against_naive(batch.call, batch.plain, batch.leaves(2, 32), torch.float16, batch.slices())


def test_heads_and_samples_one_at_a_time_give_what_all_at_once_give(monkeypatch, slower_path):
    batch = mixed()
    leaves = {name: leaf.float() for name, leaf in batch.leaves(3, 8).items()}
    together = contract.run(batch.call, leaves)
    assert len(list(segments.head_slices(3, 4, batch.layout.max_length))) == 1
    monkeypatch.setattr(segments, "PAIRS_OF_DEVICE_HEADS", 1)
    assert list(segments.head_slices(3, 4, 9)) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    apart = contract.run(batch.call, leaves)
    torch.testing.assert_close(apart[0][0], together[0][0])
    contract.assert_close_gradients(apart[1], together[1], "heads apart")


def test_the_slower_path_is_said_once_for_each_reason(monkeypatch):
    force_gpu_paths(monkeypatch)
    monkeypatch.setattr(cuda_extension, "unavailable_reason", lambda: "nothing was built")
    _say_once.cache_clear()
    batch = text_only()
    leaves = {name: leaf.bfloat16() for name, leaf in batch.leaves(2, 32).items()}
    with pytest.warns(RuntimeWarning) as heard:
        for _ in range(2):
            batch.call(**leaves)
    (line,) = (str(warning.message) for warning in heard)
    assert line.startswith("relative_bias_attention: takes the slower path") and line.endswith("nothing was built")
    assert "\n" not in line
    with pytest.warns(RuntimeWarning, match=r"float16 or bfloat16, got float32"):
        batch.call(**{name: leaf.float() for name, leaf in leaves.items()})


MISFITS = {
    "expected float16 or bfloat16, got float32": {"dtype": torch.float32},
    "expected heads of 32, 64, 128, got 48": {"head_dim": 48},
    "expected at most 16 modalities, got 17": {"modalities": 17},
    "expected a GPU of compute capability 8.0 or later, got 7.5": {"capability": (7, 5)},
    r"was built \(sm_90a\), got compute capability 8.6; install again with .*=sm_86": {"built": "sm_90a"},
    "expected at most 65536 bytes of shared memory for a thread block, got 120000": {"needed": 120000},
    "no NVIDIA driver is found": {"driver": "no NVIDIA driver is found"},
}


@pytest.mark.parametrize("reason", MISFITS)
def test_what_the_kernel_does_not_take_is_named_in_one_line(monkeypatch, reason):
    found = {"dtype": torch.bfloat16, "head_dim": 64, "modalities": 16, "capability": (8, 6), "driver": None}
    found |= {"built": ARCHITECTURES, "needed": 65536}

    def refused(dtype, head_dim, modalities, capability, driver, built, needed):
        def shared_memory(**asked):
            assert asked == {"device": -1, "head_dim": head_dim, "entries": [9] * modalities}
            return needed, 65536

        extension = SimpleNamespace(MAX_MODALITIES=16, ARCHITECTURES=built, shared_memory=shared_memory)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(cuda_extension, "unavailable_reason", lambda: driver)
        monkeypatch.setattr(cuda_extension, "extension", lambda: extension)
        bias = [torch.zeros(1, 9)] * modalities
        return attention_on_gpu.refusal(torch.zeros(2, 3, 1, head_dim, dtype=dtype), modalities, bias)

    assert refused(**found) is None
    line = refused(**{**found, **MISFITS[reason]})
    assert line and re.search(reason, line) and "\n" not in line


@pytest.mark.requires_compiler
@pytest.mark.parametrize("layout", ["off by one element", "last dimension apart"])
def test_what_16_bytes_cannot_be_read_from_is_refused_in_one_line(kernel, layout):
    batch = text_only()
    leaves = {name: leaf.bfloat16() for name, leaf in batch.leaves(2, 32).items()}
    storage = torch.zeros(leaves["qkv"].numel() + 1, dtype=torch.bfloat16)
    shifted = storage[1:].view_as(leaves["qkv"])
    qkv = shifted if layout == "off by one element" else contract.transposed(leaves["qkv"])
    contract.refused("qkv", batch.call, **{**leaves, "qkv": qkv})


@pytest.mark.requires_compiler
def test_a_gpu_with_too_little_shared_memory_takes_the_slower_path_in_both_passes(monkeypatch, host_extension):
    """It is known before the forward pass, not in the first backward one."""
    use(monkeypatch, host_extension)
    monkeypatch.setenv("HOST_SHIM_SHARED_LIMIT", str(64 * 1024))
    _say_once.cache_clear()
    batch, launched = mixed(), cuda_extension.launched()
    with pytest.warns(RuntimeWarning, match=r"at most 65536 bytes of shared memory for a thread block, got \d+$"):
        contract.check_against_naive(batch.call, batch.plain, batch.leaves(2, 64), torch.bfloat16, batch.slices())
    assert cuda_extension.launched() == launched


@pytest.mark.requires_compiler
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
    leaves = {name: leaf.bfloat16() for name, leaf in text_only().leaves(2, 32).items()}
    qkv = leaves["qkv"].requires_grad_()
    text_only().call(**leaves).sum().backward()
    assert [value for _, value in guarded] == [qkv.get_device()] * 2
    assert all(tensor.data_ptr() == qkv.data_ptr() for tensor, _ in guarded)


@pytest.mark.requires_compiler
def test_the_kernels_read_nothing_on_the_host_though_it_does_not_know_the_longest_sample(kernel, monkeypatch):
    batch = mixed()
    leaves = {name: leaf.bfloat16().requires_grad_() for name, leaf in batch.leaves(2, 32).items()}
    batch.arguments["max_length"] = 0
    for name in ("item", "tolist", "numpy", "cpu", "__int__", "__float__", "__bool__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"the host reads by {name}"))
    batch.call(**leaves).sum().backward()
    assert all(leaf.grad is not None for leaf in leaves.values())


@pytest.mark.parametrize("captured", (True, False))
def test_the_slower_path_says_that_it_waits_and_is_not_captured(slower_path, monkeypatch, captured):
    monkeypatch.setattr(segments, "_is_captured", lambda tensor: captured)
    _say_once.cache_clear()
    batch = text_only()
    leaves = {name: leaf.bfloat16() for name, leaf in batch.leaves(2, 32).items()}
    known = batch.call(**leaves)
    batch.arguments["max_length"] = 0
    with pytest.warns(
        RuntimeWarning, match=r"there is no extension; without max_length each call waits for the device$"
    ):
        if captured:
            line = "^max_length: expected .* while a CUDA graph is captured [^\n]*, got 0; pass max_length[^\n]*$"
            with pytest.raises(ValueError, match=line):
                batch.call(**leaves)
        else:
            assert torch.equal(batch.call(**leaves), known)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["kernel", "slower path"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_on_a_gpu_values_and_gradients_follow_the_dense_bias(monkeypatch, name, dtype, way):
    batch = BATCHES[name]()
    on_cpu = {key: leaf.to(dtype) for key, leaf in batch.leaves(2, 64).items()}
    if way != "kernel":
        monkeypatch.setattr(cuda_extension, "unavailable_reason", lambda: "left out by this test")

    def call(qkv, head_scale=None, **tables):
        bias = [tables[f"table{m}"][table.entries.cuda()].t() for m, table in enumerate(batch.tables)]
        plan = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in batch.arguments.items()}
        offsets = [table.offset for table in batch.tables]
        return relative_bias_attention(qkv, bias=bias, code_offsets=offsets, head_scale=head_scale, **plan)

    given = contract.cotangents([batch.plain(**on_cpu)])
    plain = contract.run(batch.plain, on_cpu, given)
    exact = contract.run(batch.plain, {key: leaf.double() for key, leaf in on_cpu.items()}, given)
    leaves = {key: leaf.cuda() for key, leaf in on_cpu.items()}
    before = cuda_extension.launched()
    with warnings.catch_warnings():
        warnings.simplefilter("error" if way == "kernel" else "ignore", RuntimeWarning)
        outputs, gradients = contract.run(call, leaves, [gradient.cuda() for gradient in given])
    assert cuda_extension.launched() - before == (2 if way == "kernel" else 0)
    assert_within_rule("out", outputs[0].cpu(), plain[0][0], exact[0][0], batch.slices()["out0"])
    for key, gradient in gradients.items():
        theirs, truth = (
            torch.zeros_like(on_cpu[key]) if run[1][key] is None else run[1][key] for run in (plain, exact)
        )
        assert_within_rule(key, gradient.cpu(), theirs, truth, batch.slices().get(key, ()))
