"""The operations that have Triton kernels, and the kernels: one file tests an operation's reference and its kernels.

    python -m pytest tests/kernels                          the references, in the ordinary suite
    TRITON_INTERPRET=1 python -m pytest tests/kernels       the kernels on a CPU: small sizes, float32 and float16
    python -m pytest -m gpu tests/kernels                   the kernels on a GPU: real sizes too, bfloat16 as well

Triton decides when it is imported whether it interprets its kernels, so the interpreter needs a process of its own:
`tests/test_kernels.py` runs the second line and prints how many tests passed. `make gpu` runs the third.

A test takes the device, the dtypes and the numbers of rows from `support.kernels`. Where kernels run, memory that
torch.empty hands out is filled with NaN, so that an element that one should have written and did not is seen.
"""

from typing import Any

import pytest
from support.kernels import DEVICE, INTERPRETED

# What takes longest in the interpreter, which leaves it to the slow tests; half precision of all but the values too.
SELDOM = {
    "test_a_whole_layer_captured_forward_and_backward_follows_its_refilled_plan",
    "test_a_layer_compiles_in_one_graph_with_skipped_rows",
    "test_as_many_backward_launches_for_any_number_of_modalities_and_fewer_for_what_is_frozen",
    "test_compiled_equals_eager",
    "test_each_gradient_alone_has_the_bits_that_it_has_among_the_others",
    "test_each_gradient_is_there_whatever_else_is_frozen",
    "test_frozen_parameters_get_no_gradient_and_idle_ones_get_zeros",
    "test_many_rows_follow_the_naive_code",
    "test_many_rows_follow_the_naive_norm",
    "test_many_rows_follow_the_naive_ones_in_every_sample",
    "test_nan_in_one_modality_leaves_the_others_alone",
    "test_one_dynamic_graph_serves_every_number_of_rows",
    "test_registration",
    "test_registration_and_compiled_graphs",
    "test_repeats_are_bitwise_equal",
    "test_rows_that_the_kernels_do_not_hold_are_the_reference_s_and_it_is_said_once",
    "test_rows_wider_than_a_block_of_columns_follow_the_naive_ones",
    "test_skipped_rows_keep_their_bits_and_the_rest_is_as_if_all_were_computed",
    "test_strides_do_not_matter",
    "test_strides_do_not_matter_to_the_kernels_between_products",
    "test_strides_of_inputs_and_gradients_do_not_matter",
    "test_sums_over_many_tiles_of_rows_follow_the_naive_ones",
    "test_the_folded_norm_keeps_the_digits_of_one_of_its_own_however_far_the_mean_is",
    "test_what_is_recomputed_has_the_bits_of_what_is_kept",
}
IN_HALF = ("test_values_and_gradients_follow_the_naive_ones", "test_every_combination_of_options_follows_the_naive_one")

KERNELS_ALONE = (
    "encoder", "goldens", "grouped_gemm", "launch", "mixture_of_transformers", "routed_ffn_grouped",
    "routed_ffn_hybrid", "traffic",
)  # fmt: skip

if INTERPRETED or DEVICE == "cuda":
    from support.kernels import poisoned_memory  # noqa: F401  a fixture of all tests here
else:
    collect_ignore = [f"test_{name}.py" for name in KERNELS_ALONE]


if INTERPRETED:
    from triton.runtime import interpreter

    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_tensor_and_index(tensor: Any, *rest: Any) -> None:
        """A loop's bound may be a loaded number: Triton 3.6 takes int() of its array, which NumPy 2.4 refuses."""
        _patch_tensor(tensor, *rest)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_tensor_and_index


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU these are GPU tests, which `make gpu` runs; in the interpreter some are slow."""
    for item in items:
        if item.path.parent.name != "kernels":
            continue
        name = item.name.partition("[")[0]
        if DEVICE == "cuda":
            item.add_marker(pytest.mark.gpu)
        elif INTERPRETED and (name in SELDOM or ("float16" in item.name and name not in IN_HALF)):
            item.add_marker(pytest.mark.slow)
