"""The residual kernels, alone and with LayerNorm: the contract of the ops, and what holds of the kernels alone."""

import torch
from ops.test_residual import (  # noqa: F401  what holds of the reference as well
    NORM,
    test_a_row_index_adds_the_branch_to_these_rows,
    test_an_output_without_a_gradient_counts_as_zero,
    test_every_combination_of_options_follows_the_naive_one,
    test_frozen_parameters_get_no_gradient_and_no_rows_give_zeros,
    test_many_rows_follow_the_naive_ones_in_every_sample,
    test_nan_stays_in_its_row,
    test_registration_and_compiled_graphs,
    test_repeats_are_bitwise_equal,
    test_rows_past_the_extent_are_x,
    test_strides_of_inputs_and_gradients_do_not_matter,
    test_the_stream_may_be_float32_over_a_half_precision_branch,
    test_values_and_gradients_follow_the_naive_ones,
)
from support import contract
from support.contract import normal
from support.kernels import DEVICE, DTYPES, far_apart, first, int32, on_device
from support.residual_cases import DROP_PATH, leaves_of, op, plain, sample_of

from onepeace_fast import layer_norm, residual
from onepeace_fast.kernels.launch_heuristic import Parameters
from onepeace_fast.kernels.launch_parameters import use_launch_parameters
from onepeace_fast.ops.dropout import dropout_factor


def test_the_norm_is_that_of_the_stream_as_it_is_stored():
    leaves = on_device(leaves_of(30, 64, True), DTYPES[-1])
    out, normed = op(30)(**leaves)
    expected = layer_norm(out, leaves["norm_weight"], leaves["norm_bias"])
    assert (normed != expected).float().mean() < 0.01  # not before it is rounded


@NORM
def test_rows_in_parts_take_a_row_index_and_dropout(norm):
    options, entry = {"index": [5, 0, 6], "dropout": 0.4}, "residual_layer_norm" if norm else "residual"
    in_parts = Parameters(4096, 1, 8, 1, parts=2)  # the heuristic holds these rows whole
    with use_launch_parameters(entry, in_parts), use_launch_parameters(f"{entry}_backward", in_parts):
        leaves = leaves_of(7, 3000, norm, branch_rows=3)
        contract.check_against_naive(op(7, **options), plain(7, **options), leaves, torch.float32)


@NORM
def test_skipped_rows_are_x_and_the_others_have_the_bits_of_the_whole(norm):
    rows = 30
    dropped = DROP_PATH[sample_of(rows).long()] == 0
    index = torch.nonzero(~dropped).flatten().tolist()
    assert 0 < len(index) < rows
    for dtype in DTYPES:
        for dropout in first((0.3, 0.0)):
            leaves = on_device(leaves_of(rows, 64, norm), dtype)
            leaves["x"][3] = -0.0
            given = [normal(rows, 64, seed=8 + i, dtype=dtype).to(DEVICE) for i in range(1 + norm)]
            whole, every = contract.run(op(rows, dropout=dropout), leaves, given)
            some_leaves = {**leaves, "y": leaves["y"][index]}
            part, some = contract.run(op(rows, dropout=dropout, index=index), some_leaves, given)
            for a, b in zip(part, whole, strict=True):
                assert torch.equal(a, b)
            assert torch.equal(some["x"], every["x"]) and torch.equal(some["y"], every["y"][index])
            bits = torch.int32 if dtype == torch.float32 else torch.int16
            assert torch.equal(part[0][dropped].view(bits), leaves["x"][dropped].view(bits))


def test_the_gradient_of_rows_that_an_index_leaves_out_is_not_read_for_gamma():
    index = [5, 0, 6]
    leaves = on_device(leaves_of(7, 64, True, branch_rows=3), torch.float32)
    given = [normal(7, 64, seed=seed, dtype=torch.float32).to(DEVICE) for seed in (8, 9)]
    expected = contract.run(op(7, index=index), leaves, given)[1]
    given[0][[1, 2, 3, 4]] = torch.nan
    actual = contract.run(op(7, index=index), leaves, given)[1]
    assert torch.equal(actual["gamma"], expected["gamma"]) and torch.equal(actual["y"], expected["y"])


def test_offsets_are_read_on_the_device():
    x, y, offsets = torch.zeros(12, 64, device=DEVICE), torch.ones(12, 64, device=DEVICE), int32([0, 5])
    assert residual(x, y, offsets=offsets).sum() == 5 * 64
    offsets.copy_(int32([0, 9]))
    assert residual(x, y, offsets=offsets).sum() == 9 * 64


def test_elements_past_2_to_the_31st_are_reached(tmp_path):
    rows = normal(3, 64, seed=1, dtype=torch.float16).to(DEVICE)
    y = far_apart(normal(3, 64, seed=2, dtype=torch.float16).to(DEVICE), tmp_path)
    assert torch.equal(residual(rows, y), residual(rows, y.contiguous()))
    assert torch.equal(residual(y, rows), residual(y.contiguous(), rows))


def test_dropout_s_random_numbers_are_those_of_the_reference():
    rows, width, seeds = 5, 70, (0, -1, 2**63 - 1, 2**32)
    for seed in (torch.tensor(value, device=DEVICE) for value in seeds):
        out = residual(torch.zeros(rows, width, device=DEVICE), torch.ones(rows, width, device=DEVICE),
                       dropout=0.3, seed=seed)  # fmt: skip
        torch.testing.assert_close(out, dropout_factor(seed, out.shape, 0.3), rtol=1e-6, atol=0)
