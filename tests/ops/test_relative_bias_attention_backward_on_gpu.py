"""The gradients of ``relative_bias_attention`` by the CUDA kernels, which run here on the CPU, compiled by g++."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from support import contract
from support.attention_cases import Batch, kept_grid, kept_text, mixed, random_codes, series, text_only
from support.contract import normal
from support.host_extension import use
from support.plans import kept_positions, naive_layout, whole_rows
from torch.utils.checkpoint import checkpoint

from onepeace_fast import cuda_extension, relative_bias_attention
from onepeace_fast.ops import attention_on_gpu
from onepeace_fast.structures import AttentionGradients, AttentionSaved, RelativeBias, Segments, VectorGradients
from onepeace_fast.tolerance import DTYPES, HALF

pytestmark = [pytest.mark.requires_compiler, pytest.mark.filterwarnings("error::RuntimeWarning")]


def long_range() -> Batch:
    """Two modalities whose vectors of 2047 distances do not fit into shared memory together."""
    kept = {"text": [9, 4], "audio": [12, 20]}
    positions = {name: kept_positions(rows, 1023, seed=5) for name, rows in kept.items()}
    return Batch(naive_layout(whole_rows(kept), positions=positions), (series(64, 1024), series(256, 1024)))


BATCHES = {"text": text_only, "kept text": kept_text, "kept grid": kept_grid, "mixed": mixed, "long range": long_range}


@pytest.fixture
def kernel(monkeypatch, host_extension):
    """The kernels run, and none of them in vain."""
    use(monkeypatch, host_extension)
    before = cuda_extension.launched()
    yield host_extension
    assert cuda_extension.launched() > before


def rounded(batch, dtype=torch.bfloat16, heads=2, dim=32):
    """The batch's leaves, in one dtype."""
    return {name: leaf.to(dtype) for name, leaf in batch.leaves(heads, dim).items()}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name, multiprocessors", [*((name, 1) for name in BATCHES), ("long range", 132)])
def test_values_and_gradients_follow_the_dense_bias(monkeypatch, host_extension, name, dtype, multiprocessors):
    """Where test_relative_bias_attention_on_gpu.py has many multiprocessors, one."""
    use(monkeypatch, host_extension, multiprocessors)
    batch = BATCHES[name]()
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
    layout, entries, offset = random_codes()
    qkv = normal(layout.capacity, 3, 2, 32, seed=1, dtype=torch.float16)
    single = {"vector": normal(2, entries, seed=2).float(), "head_scale": normal(2, seed=3).float()}
    plan = layout.attention_arguments()

    def call(qkv, vector, head_scale):
        return relative_bias_attention(qkv, bias=[vector], code_offsets=[offset], head_scale=head_scale, **plan)

    double = {"qkv": qkv, **{name: leaf.double() for name, leaf in single.items()}}
    expected = contract.run(call, {"qkv": qkv, **single})
    actual = contract.run(call, double)
    assert all(actual[1][name].dtype == torch.float64 for name in single)
    contract.assert_same(actual, (expected[0], {name: g.to(double[name].dtype) for name, g in expected[1].items()}), "")
    contract.check_registration(call, double, "relative_bias_attention")
    contract.check_compiled(call, double)


def test_gradients_of_any_layout_give_the_same_bits(kernel):
    batch = mixed()
    for dtype in HALF:
        contract.check_gradient_layouts(batch.call, rounded(batch, dtype))
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


def launch_backward(batch, leaves, bias_needs=(True,) * 4, head_scale_need=True, **changes):
    """The launch without autograd; ``changes`` override its tensors."""
    plan = batch.arguments
    qkv = leaves["qkv"]
    bias = [leaves[f"table{m}"][table.entries].t() for m, table in enumerate(batch.tables)]
    saved = AttentionSaved(
        grad_out=torch.zeros(qkv.shape[0], *qkv.shape[2:], dtype=qkv.dtype), qkv=qkv,
        segments=Segments(*(plan[name] for name in Segments._fields)),
        bias=RelativeBias(bias, tuple(table.offset for table in batch.tables)), head_scale=leaves["head_scale"],
        log_sum_exp=torch.zeros(qkv.shape[0], qkv.shape[2]), scale=1.0,
    )  # fmt: skip
    needs = AttentionGradients(True, VectorGradients([*bias_needs][: len(bias)]), head_scale_need)
    return attention_on_gpu.launch_backward(saved._replace(**changes), needs)


def test_a_gradient_or_qkv_that_does_not_fit_is_refused_in_one_line(kernel):
    batch = text_only()
    leaves = rounded(batch)
    good = torch.zeros_like(leaves["qkv"][:, 0])
    for bad in (good.half(), good.float(), good.to("meta"), good[1:], good.flatten(1)):
        contract.refused("grad", launch_backward, batch, leaves, grad_out=bad)
    contract.refused("qkv", launch_backward, batch, leaves, qkv=contract.transposed(leaves["qkv"]))
    launch_backward(batch, leaves, grad_out=good)


def test_frozen_parameters_get_no_gradient_and_the_others_the_same_bits(kernel):
    batch = mixed()
    leaves = rounded(batch, heads=2)
    contract.check_frozen(batch.call, leaves)
    outputs, expected = contract.run(batch.call, leaves)
    tables = [name for name in leaves if name.startswith("table")]
    for frozen in (tables, tables[1:], [*tables, "head_scale"], [name for name in leaves if name != "head_scale"]):
        actual = contract.run(batch.call, leaves, frozen=frozen)
        contract.assert_same(actual, (outputs, expected | dict.fromkeys(frozen)), f"{frozen} frozen")


def test_what_is_frozen_gets_nothing_from_the_launch(kernel):
    batch = mixed()
    leaves = rounded(batch)
    for needs in itertools.product([True, False], repeat=2):
        bias_needs = [needs[0], not needs[0], False, needs[0]]
        dqkv, (dbias,), dscale = launch_backward(batch, leaves, bias_needs=bias_needs, head_scale_need=needs[1])
        assert dqkv.shape == leaves["qkv"].shape and dqkv.is_contiguous()
        assert [gradient is not None for gradient in dbias] == bias_needs and (dscale is not None) == needs[1]


def test_a_modality_without_tokens_gets_zeros(kernel):
    gradients = contract.run(mixed().call, rounded(mixed()))[1]
    assert gradients["table3"] is not None and not gradients["table3"].any()
    assert all(gradients[f"table{m}"].any() for m in range(3))


@pytest.mark.parametrize("lengths", ([0, 3, 2], [0, 0], [0], []), ids=str)
def test_samples_without_tokens(kernel, lengths):
    batch = Batch(naive_layout(whole_rows({"text": lengths}), capacity=sum(lengths) + 2), (series(4, 5),))
    contract.check_against_naive(batch.call, batch.plain, batch.leaves(2, 32), torch.float16, batch.slices())
    batch = Batch(naive_layout(whole_rows({"text": lengths})), (series(4, 5),))
    contract.check_against_naive(batch.call, batch.plain, batch.leaves(2, 32), torch.float16, batch.slices())


def test_nan_in_inert_rows_and_in_memory_that_nobody_wrote_reaches_nothing(kernel):
    batch = mixed()
    leaves = rounded(batch)
    (out,), _ = contract.run(batch.call, leaves)
    given = contract.cotangents([out])
    expected = contract.run(batch.call, leaves, given)
    inert = slice(len(batch.layout.tokens), None)
    leaves["qkv"][inert], given[0][inert] = torch.nan, torch.nan
    torch.use_deterministic_algorithms(True)  # with which torch fills new memory with NaN
    try:
        assert torch.empty(3).isnan().all()
        contract.assert_same(contract.run(batch.call, leaves, given), expected, "NaN")
    finally:
        torch.use_deterministic_algorithms(False)
    assert not expected[1]["qkv"][inert].any() and len(expected[1]["qkv"][inert])


def test_nan_in_another_sample_does_not_leak(kernel):
    batch = mixed()
    leaves = rounded(batch)
    expected = contract.run(batch.call, leaves)[1]["qkv"]
    for sample in range(batch.layout.samples):
        rows = batch.layout.rows_of(sample)
        others = [row for row in range(batch.layout.capacity) if row not in rows]
        poisoned = {**leaves, "qkv": leaves["qkv"].clone()}
        poisoned["qkv"][rows] = torch.nan
        assert torch.equal(contract.run(batch.call, poisoned)[1]["qkv"][others], expected[others])


def test_with_one_modality_every_head_s_bias_gradient_sums_to_zero(kernel):
    for batch in (text_only(), kept_text(), kept_grid()):
        leaves = {name: leaf.half() if name == "qkv" else leaf.float() for name, leaf in batch.leaves(2, 32).items()}
        gradient = contract.run(batch.call, leaves)[1]["table0"]
        assert (gradient.sum(0).abs() < 2e-3 * gradient.abs().sum(0)).all() and gradient.abs().sum(0).min() > 0.1


@pytest.mark.parametrize("batch", [kept_grid(), mixed()], ids=["kept grid", "mixed"])
def test_registration_and_compilation(kernel, batch):
    batch.arguments  # noqa: B018 (made outside the graph)
    leaves = rounded(batch)
    if len(batch.tables) == 1:
        contract.check_registration(batch.call, leaves, "relative_bias_attention")
    contract.check_compiled(batch.call, leaves)


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


def test_second_derivative_is_refused_in_one_line(kernel):
    batch = text_only()
    contract.check_second_derivative(batch.call, rounded(batch))


def test_repeats_are_bitwise_equal(kernel):
    batch = mixed()
    contract.check_deterministic(batch.call, rounded(batch), repeats=5)


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
