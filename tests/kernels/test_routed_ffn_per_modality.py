"""``routed_ffn`` where kernels run between its products, against the naive network."""

import pytest
import torch
from support import contract
from support.ffn_cases import ALL, OPTIONS, check_nan_in_inert_rows, leaves_of, op, plain, slices_of
from support.kernels import DTYPES, REPEATS, first, interpreter_only, on_device

COUNTS = [5, 0, 7]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "counts, width, hidden, inert",
    first(
        [
            (COUNTS, 16, 40, 0),
            pytest.param([2, 0, 1], 32, 6144, 2, marks=pytest.mark.slow),
            ([1], 63, 64, 0),
            ([7, 65], 64, 200, 3),
            ([0, 0], 8, 16, 1),
        ],
        2,
    ),
    ids=str,
)
def test_values_and_gradients_follow_the_naive_ones(counts, width, hidden, inert, dtype):
    leaves = on_device(leaves_of(counts, width, hidden, inert=inert))
    contract.check_against_naive(op(counts, inert=inert), plain(counts, inert=inert), leaves, dtype, slices_of(counts))


@interpreter_only
def test_every_combination_of_options_follows_the_naive_one():
    for number in range(2 ** len(OPTIONS)):
        options = frozenset(name for i, name in enumerate(OPTIONS) if number >> i & 1)
        if "residual" in options or not options & {"gamma", "drop_path"}:
            contract.check_against_naive(
                op(COUNTS, options, inert=1, eps=0.1), plain(COUNTS, options, inert=1, eps=0.1),
                on_device(leaves_of(COUNTS, 6, 10, options, 1)), torch.float32, slices_of(COUNTS),
            )  # fmt: skip


def test_the_residual_may_be_float32_over_half_precision_products():
    leaves = on_device(leaves_of(COUNTS, 64, 96))
    dtypes = {name: torch.float32 if name in ("residual", "gamma") else torch.float16 for name in leaves}
    contract.check_against_naive(op(COUNTS), plain(COUNTS), leaves, dtypes, slices_of(COUNTS))


def test_offsets_alone_and_host_counts_give_the_same_bits():
    leaves = on_device(leaves_of(COUNTS, 16, 24, inert=2), torch.float32)
    contract.assert_same(
        contract.run(op(COUNTS, host=False, inert=2), leaves), contract.run(op(COUNTS, inert=2), leaves), "host counts"
    )


@pytest.mark.parametrize("options", (ALL, frozenset()), ids=("all options", "bare"))
def test_strides_of_inputs_and_gradients_do_not_matter(options):
    leaves = on_device(leaves_of(COUNTS, 6, 8, options), torch.float32)
    contract.check_gradient_layouts(op(COUNTS, options), leaves)
    expected = contract.run(op(COUNTS, options), leaves)
    for layout in contract.LAYOUTS:
        for name in {"z", "residual", "w0_0", "w2_1"} & set(leaves):
            actual = contract.run(op(COUNTS, options), {**leaves, name: layout(leaves[name])})
            torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-5)
            contract.assert_close_gradients(actual[1], expected[1], f"{name} {layout.__name__}")


@pytest.mark.parametrize("poisoned", ("z", "residual", "gradient"))
def test_nan_in_inert_rows_reaches_nothing(poisoned):
    leaves = on_device(leaves_of(COUNTS, 16, 24, inert=3), torch.float32)
    check_nan_in_inert_rows(op(COUNTS, inert=3), COUNTS, leaves, poisoned)


def test_inert_rows_keep_the_residual_and_are_zero_without_one():
    leaves = on_device(leaves_of(COUNTS, 16, 24, inert=3), torch.float32)
    assert torch.equal(op(COUNTS, inert=3)(**leaves)[-3:], leaves["residual"][-3:])
    bare = {name: leaf for name, leaf in leaves.items() if name not in ("residual", "gamma")}
    assert not op(COUNTS, frozenset(), inert=3)(**bare)[-3:].any()


def test_frozen_parameters_get_no_gradient_and_idle_ones_get_zeros():
    leaves = on_device(leaves_of(COUNTS, 4, 6), torch.float32)
    contract.check_frozen(op(COUNTS), leaves)
    gradients = contract.run(op(COUNTS), leaves)[1]
    idle = [name for name in leaves if name.endswith("_1")]
    assert len(idle) == 6 and not any(gradients[name].any() for name in idle)


def test_repeats_are_bitwise_equal():
    leaves = on_device(leaves_of([9, 0, 8], 31, 33, inert=3), DTYPES[-1])
    contract.check_deterministic(op([9, 0, 8], inert=3), leaves, REPEATS)


def test_compiled_equals_eager():
    contract.check_compiled(op(COUNTS, inert=1), on_device(leaves_of(COUNTS, 8, 12, inert=1), torch.float32))
