"""How ``relative_bias_attention`` runs on a GPU: by the CUDA kernels, and by PyTorch's attention where it cannot.

Here both run on the CPU: the kernels' own source and their binding compiled by g++, PyTorch's attention as it is. What
holds in every way stands in test_relative_bias_attention.py.
"""

import dataclasses
import itertools
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support import contract
from support.attention_cases import BATCHES, Batch, long_range, mixed, random_codes, text_only
from support.contract import normal
from support.host_extension import ARCHITECTURES, force_gpu_paths, use
from torch.utils.checkpoint import checkpoint

from onepeace_fast import cuda_extension
from onepeace_fast.attention_structures import (
    AttentionGradients,
    AttentionInputs,
    AttentionSaved,
    BiasVectors,
    KeySegments,
    Segments,
    VectorGradients,
)
from onepeace_fast.hardware import selftest
from onepeace_fast.hardware.cases import random_tensors, specified_cases
from onepeace_fast.ops import attention_on_gpu, segments
from onepeace_fast.ops.relative_bias_attention import _say_once
from onepeace_fast.tolerance import DTYPES, HALF, assert_within_rule

in_both_ways = pytest.mark.parametrize("way", ["slower_path", "kernel"], indirect=True)


def rounded(batch, dtype=torch.bfloat16):
    """The batch's leaves, in one dtype."""
    return batch.leaves(2, 32, dtype=dtype)


def inputs(batch, leaves):
    """What a launch takes of them."""
    given = batch.given(leaves)
    bias = BiasVectors(given["bias"], tuple(given["code_offsets"]))
    segments = Segments(**{name: given[name] for name in Segments._fields if name in given})
    apart, scale = (None,) * 3, batch.scale or 1.0
    return AttentionInputs(leaves["qkv"], *apart, segments, KeySegments(), bias, leaves["head_scale"], scale)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", [*BATCHES, "long range"])
def test_one_thread_block_gives_the_gradients_that_many_give(monkeypatch, host_extension, name, dtype):
    use(monkeypatch, host_extension, multiprocessors=1)
    batch = {**BATCHES, "long range": long_range}[name]()
    contract.check_against_naive(batch.call, batch.plain, batch.leaves(2, 32), dtype, batch.slices())


@pytest.mark.slow
@pytest.mark.parametrize("multiprocessors, dtype, known", [(1, torch.float16, False), (132, torch.bfloat16, True)])
@pytest.mark.parametrize("dim", [32, 64, 128])
def test_keys_of_long_samples(monkeypatch, host_extension, dim, multiprocessors, dtype, known):
    """One thread block walks them all, without knowing how many they are; or many share them."""
    use(monkeypatch, host_extension, multiprocessors)
    batch = mixed(long=True)
    batch.arguments["max_length"] *= known
    contract.check_against_naive(batch.call, batch.plain, batch.leaves(2, dim), dtype, batch.slices())


@pytest.mark.parametrize("dim", [64, 128])
def test_a_gpu_whose_thread_blocks_have_99_kib_trains(kernel, monkeypatch, dim):
    """As compute capability 8.6, 8.9 and 12.0 do."""
    monkeypatch.setenv("HOST_SHIM_SHARED_LIMIT", str(99 * 1024))
    batch = mixed()
    contract.check_against_naive(batch.call, batch.plain, batch.leaves(2, dim), torch.bfloat16, batch.slices())


def test_the_device_s_multiprocessors_are_asked_for_once(monkeypatch):
    asked = []
    properties = type("Properties", (), {"multi_processor_count": 114})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: asked.append(device) or properties)
    attention_on_gpu._multiprocessors.cache_clear()
    devices = [torch.device("cuda", index) for index in (0, 1, 0)]
    assert [attention_on_gpu._multiprocessors(device) for device in devices] == [114] * 3
    assert asked == devices[:2]
    attention_on_gpu._multiprocessors.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_keep_their_own_dtype(kernel, dtype):
    batch = Batch(mixed().layout, mixed().tables, 0.3)
    leaves = batch.leaves(2, 32)
    dtypes = {name: torch.bfloat16 if name == "qkv" else dtype for name in leaves}
    contract.check_against_naive(batch.call, batch.plain, leaves, dtypes, batch.slices())


def test_parameters_in_float64_get_float32_s_gradients_in_float64(kernel):
    batch = random_codes()
    single = {name: leaf.half() if name == "qkv" else leaf.float() for name, leaf in batch.leaves(2, 32).items()}
    double = {name: leaf.double() if name != "qkv" else leaf for name, leaf in single.items()}
    outputs, gradients = contract.run(batch.call, single)
    expected = outputs, {name: gradient.to(double[name].dtype) for name, gradient in gradients.items()}
    actual = contract.run(batch.call, double)
    assert all(actual[1][name].dtype == double[name].dtype for name in double)
    contract.assert_same(actual, expected, "float64")
    contract.check_registration(batch.call, double, "relative_bias_attention")
    contract.check_compiled(batch.call, double)


@in_both_ways
def test_the_selftest_tells_what_the_kernels_compute_from_what_they_do_not(way):
    make = lambda: random_tensors(torch.device("cpu"), 0)  # noqa: E731
    cases = [list(specified_cases(20, torch.bfloat16, make(), torch.device("cpu")))[1] for _ in range(2)]
    rows = list(selftest.compare_case(*cases, torch.bfloat16))
    assert {row.operation for row in rows} == {"relative_bias_attention"} and all(row.kept for row in rows)
    assert {row.tensor.split()[0] for row in rows} == {"out0", *cases[0].leaves}
    assert all(row.by_kernel == (way == "kernel") for row in rows)


@in_both_ways
def test_the_backward_pass_runs_where_the_forward_pass_ran(way):
    batch = text_only()
    qkv = batch.leaves(2, 32)["qkv"].half().requires_grad_()
    launched = [cuda_extension.launched()]
    out = batch.call(qkv)
    launched.append(cuda_extension.launched())
    out.sum().backward()
    launched.append(cuda_extension.launched())
    assert [count - launched[0] for count in launched] == ([0, 0, 0] if way == "slower_path" else [0, 1, 2])


def test_the_plan_s_tensors_and_parameters_may_have_any_strides(kernel):
    batch = mixed()
    leaves = rounded(batch)
    expected = batch.call(**leaves)
    plan = batch.arguments
    plan |= {name: plan[name].repeat_interleave(2, -1)[..., ::2] for name in ("cu_seqlens", "code", "is_cls")}
    assert not any(plan[name].is_contiguous() for name in ("cu_seqlens", "code", "is_cls"))
    assert torch.equal(batch.call(**{**leaves, "head_scale": contract.stepped(leaves["head_scale"])}), expected)


def test_gradients_of_any_layout_give_the_same_bits(kernel):
    batch = mixed()
    leaves = rounded(batch)
    (out,), expected = contract.run(batch.call, leaves)
    (given,) = contract.cotangents([out])
    aligned = torch.full((out.shape[0], 3, 48), torch.nan, dtype=out.dtype)[:, :2, 8:40].copy_(given)
    shifted = given.new_full((given.numel() + 1,), torch.nan)[1:].view_as(given).copy_(given)
    assert shifted.is_contiguous() and shifted.data_ptr() % 16 and not aligned.is_contiguous()
    for name, gradient in {"read in place": aligned, "off 16 bytes": shifted}.items():
        contract.assert_same_gradients(contract.run(batch.call, leaves, [gradient])[1], expected, name)
    one = normal(2, 32, seed=8, dtype=out.dtype)
    repeated = contract.run(batch.call, leaves, [one.expand_as(out).contiguous()])[1]
    contract.assert_same_gradients(contract.run(batch.call, leaves, [one.expand_as(out)])[1], repeated, "expanded")


def test_the_log_sum_exp_is_pytorchs_and_inert_rows_are_zero(kernel):
    batch = dataclasses.replace(mixed(), scale=0.2)
    leaves = batch.leaves(2, 32)
    single = {name: leaf.float() for name, leaf in leaves.items()}
    single["qkv"] = single["qkv"].half()
    out, total = attention_on_gpu.launch_forward(inputs(batch, single))
    plain, exact = (
        batch.log_sum_exp(**{name: leaf.to(dtype) for name, leaf in single.items()})
        for dtype in (torch.float32, torch.float64)
    )
    assert_within_rule("log_sum_exp", total, plain, exact, [(..., head) for head in range(2)])
    inert = slice(len(batch.layout.tokens), None)
    assert not out[inert].any() and not total[inert].any() and len(out[inert])


def launch_backward(batch, leaves, bias_needs=(True,) * 4, head_scale_need=True, **changes):
    """The launch without autograd; ``changes`` override its tensors."""
    given = inputs(batch, leaves)
    out = torch.zeros_like(given.qkv[:, 0])
    saved = AttentionSaved(out, *given[:-2], torch.zeros(out.shape[:2]), given.scale)
    vectors = VectorGradients([*bias_needs][: len(batch.tables)])
    needs = AttentionGradients(True, None, None, None, vectors, head_scale_need)
    return attention_on_gpu.launch_backward(saved._replace(**changes), needs)


def test_a_gradient_or_qkv_that_does_not_fit_is_refused_in_one_line(kernel):
    batch = text_only()
    leaves = rounded(batch)
    good = torch.zeros_like(leaves["qkv"][:, 0])
    for bad in (good.half(), good.float(), good.to("meta"), good[1:], good.flatten(1)):
        contract.refused("grad", launch_backward, batch, leaves, grad_out=bad)
    contract.refused("qkv", launch_backward, batch, leaves, qkv=contract.transposed(leaves["qkv"]))
    launch_backward(batch, leaves, grad_out=good)


def test_what_is_frozen_gets_nothing_from_the_launch(kernel):
    batch = mixed()
    leaves = rounded(batch)
    for needs in itertools.product([True, False], repeat=2):
        bias_needs = [needs[0], not needs[0], False, needs[0]]
        dqkv, *_, (dbias,), dscale = launch_backward(batch, leaves, bias_needs=bias_needs, head_scale_need=needs[1])
        assert dqkv.shape == leaves["qkv"].shape and dqkv.is_contiguous()
        assert [gradient is not None for gradient in dbias] == bias_needs and (dscale is not None) == needs[1]


def test_activation_checkpointing_gives_the_same_bits(kernel):
    batch = mixed()
    leaves = rounded(batch)
    names = list(leaves)

    def call(**mine):
        run = lambda *values: batch.call(**dict(zip(names, values, strict=True)))  # noqa: E731
        return checkpoint(run, *(mine[name] for name in names), use_reentrant=False)

    expected = contract.run(batch.call, leaves)
    before = cuda_extension.launched()
    contract.assert_same(contract.run(call, leaves), expected, "checkpointed")
    assert cuda_extension.launched() - before == 3  # forward, forward again, backward


def test_under_autocast_a_float32_model_gets_what_it_gets_by_converting_itself(kernel):
    batch = mixed()
    leaves = {name: leaf.float() for name, leaf in batch.leaves(2, 32).items() if name != "qkv"}
    leaves |= {"x": normal(batch.layout.capacity, 24, seed=4).float(), "weight": normal(192, 24, seed=5).float() / 5}

    def call(x, weight, dtype=None, **parameters):
        product = F.linear(x, weight) if dtype is None else F.linear(x.to(dtype), weight.to(dtype))
        return batch.call(product.view(x.shape[0], 3, 2, 32), **parameters)

    def under_autocast(**mine):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return call(**mine)

    actual = contract.run(under_autocast, leaves)
    assert actual[0][0].dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in actual[1].values())
    before = cuda_extension.launched()
    expected = contract.run(lambda **mine: call(**mine, dtype=torch.bfloat16), leaves)
    assert cuda_extension.launched() - before == 2
    contract.assert_same(actual, expected, "autocast")


def test_the_slower_path_is_said_once_for_each_reason(monkeypatch):
    force_gpu_paths(monkeypatch)
    monkeypatch.setattr(cuda_extension, "unavailable_reason", lambda: "nothing was built")
    _say_once.cache_clear()
    batch = text_only()
    leaves = rounded(batch)
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
    "expected heads of at most 128, got 136": {"head_dim": 136},
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
            sizes = {"head_dim": head_dim, "value_dim": head_dim}
            assert asked == {"device": -1, **sizes, "entries": [9] * modalities}
            return needed, 65536

        extension = SimpleNamespace(MAX_MODALITIES=16, ARCHITECTURES=built, shared_memory=shared_memory)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(cuda_extension, "unavailable_reason", lambda: driver)
        monkeypatch.setattr(cuda_extension, "extension", lambda: extension)
        rows, bounds = torch.zeros(2, dtype=torch.int32), torch.zeros(modalities, 2, dtype=torch.int32)
        leaves = {"qkv": torch.zeros(2, 3, 1, head_dim, dtype=dtype), "head_scale": None}
        plan = {"cu_seqlens": bounds, "modality": rows, "code": rows, "is_cls": rows.bool()}
        plan |= {"bias": [torch.zeros(1, 9)] * modalities, "code_offsets": [4] * modalities}
        batch = SimpleNamespace(given=lambda _: plan, scale=1.0)
        return attention_on_gpu.refusal(inputs(batch, leaves))

    assert refused(**found) is None
    line = refused(**{**found, **MISFITS[reason]})
    assert line and re.search(reason, line) and "\n" not in line


@pytest.mark.parametrize("layout", ["off by one element", "last dimension apart"])
def test_what_16_bytes_cannot_be_read_from_is_refused_in_one_line(kernel, layout):
    batch = text_only()
    leaves = rounded(batch)
    storage = torch.zeros(leaves["qkv"].numel() + 1, dtype=torch.bfloat16)
    shifted = storage[1:].view_as(leaves["qkv"])
    qkv = shifted if layout == "off by one element" else contract.transposed(leaves["qkv"])
    contract.refused("qkv", batch.call, **{**leaves, "qkv": qkv})
    batch.call(**leaves)


def test_a_gpu_with_too_little_shared_memory_takes_the_slower_path_in_both_passes(monkeypatch, host_extension):
    """It is known before the forward pass, not in the first backward one."""
    use(monkeypatch, host_extension)
    monkeypatch.setenv("HOST_SHIM_SHARED_LIMIT", str(64 * 1024))
    _say_once.cache_clear()
    batch, launched = mixed(), cuda_extension.launched()
    with pytest.warns(RuntimeWarning, match=r"at most 65536 bytes of shared memory for a thread block, got \d+$"):
        contract.check_against_naive(batch.call, batch.plain, batch.leaves(2, 64), torch.bfloat16, batch.slices())
    assert cuda_extension.launched() == launched


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
    leaves = rounded(batch)
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


def test_a_sample_longer_than_it_was_said_to_be_is_found_where_the_environment_asks_for_it(kernel, monkeypatch):
    batch = text_only()
    leaves = rounded(batch)
    batch.arguments["max_length"] -= 1
    batch.call(**leaves)
    monkeypatch.setenv("ONEPEACE_FAST_CHECK", "1")
    contract.refused("max_length", batch.call, **leaves)
    for right in (0, 1, 2):
        batch.arguments["max_length"] = right and batch.layout.max_length + right - 1
        batch.call(**leaves)


@pytest.mark.gpu
@pytest.mark.parametrize("by", ["kernel", "slower path"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_on_a_gpu_values_and_gradients_follow_the_dense_bias(monkeypatch, name, dtype, by):
    batch = BATCHES[name]()
    plan = batch.arguments
    plan |= {key: value.cuda() for key, value in plan.items() if isinstance(value, torch.Tensor)}
    if by != "kernel":
        monkeypatch.setattr(cuda_extension, "unavailable_reason", lambda: "left out by this test")

    def call(**leaves):
        return batch.call(**{key: leaf.cuda() for key, leaf in leaves.items()}).cpu()

    before = cuda_extension.launched()
    with warnings.catch_warnings():
        warnings.simplefilter("error" if by == "kernel" else "ignore", RuntimeWarning)
        contract.check_against_naive(call, batch.plain, batch.leaves(2, 64), dtype, batch.slices())
    assert cuda_extension.launched() - before == (2 if by == "kernel" else 0)
