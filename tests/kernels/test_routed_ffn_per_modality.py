"""``routed_ffn`` where kernels run between its products: the contract of the op, which takes this way by default."""

import pytest
import torch
from ops.test_routed_ffn import (  # noqa: F401  what holds of the reference as well
    test_compiled_equals_eager,
    test_every_activation_follows_the_naive_one,
    test_every_combination_of_options_follows_the_naive_one,
    test_frozen_parameters_get_no_gradient_and_idle_ones_get_zeros,
    test_inert_rows_keep_the_residual_and_are_zero_without_one,
    test_nan_in_inert_rows_reaches_nothing,
    test_offsets_alone_and_host_counts_give_the_same_bits,
    test_repeats_are_bitwise_equal,
    test_the_residual_may_be_float32_over_half_precision_products,
    test_values_and_gradients_follow_the_naive_ones,
)
from support import contract
from support.ffn_cases import ALL, leaves_of, op
from support.kernels import on_device

COUNTS = [5, 0, 7]


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
