"""The tolerance rule itself, on errors that are known to the last digit."""

import math

import pytest
import torch

from onepeace_fast.tolerance import DTYPES, assert_within_rule, compare

EXACT = torch.tensor([[1.0, -8.0, 2.0, 0.5], [0.25, 0.0, -1.0, 4.0]], dtype=torch.float64)


def shifted(column, by):
    """EXACT with one error in each row, whose RMS is half of it."""
    moved = EXACT.clone()
    moved[:, column] += by
    return moved.float()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bound_is_twice_plain_pytorchs_error_and_four_roundings_of_the_largest_value(dtype):
    plain = shifted(2, 0.0625).to(dtype)  # exact in every dtype
    found = {(part, kind): (error, allowed) for part, kind, error, allowed, _ in compare(plain, plain, EXACT, (0, 1))}
    assert len(found) == 6
    slack = {part: 4 * torch.finfo(dtype).eps * value for part, value in ((..., 8.0), (0, 8.0), (1, 4.0))}
    for part, more in slack.items():
        assert found[part, "maximum"] == pytest.approx((0.0625, 0.125 + more), rel=1e-12)
        assert found[part, "RMS"] == pytest.approx((0.03125, 0.0625 + more), rel=1e-12)


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_an_error_just_past_the_bound_is_refused_and_one_just_inside_is_not(factor):
    plain, allowed = shifted(2, 0.0625), 0.125 + 4 * 2**-23 * 8
    actual = EXACT.float()
    actual[0, 3] += allowed * factor
    if factor < 1:
        assert_within_rule("x", actual, plain, EXACT)
    else:
        with pytest.raises(AssertionError, match=r"^x\[Ellipsis\]: maximum error"):
            assert_within_rule("x", actual, plain, EXACT)


def test_many_errors_below_the_largest_are_refused_by_their_mean_square():
    plain, actual = shifted(2, 0.0625), (EXACT + 0.12).float()
    with pytest.raises(AssertionError, match=r"^x\[Ellipsis\]: RMS error 0.12 "):
        assert_within_rule("x", actual, plain, EXACT)


def test_a_slice_is_held_against_its_own_magnitude_and_plain_error():
    plain, actual = EXACT.float(), EXACT.float()
    plain[0, 0] += 0.1
    actual[1, 0] += 0.05
    assert_within_rule("x", actual, plain, EXACT)
    with pytest.raises(AssertionError, match=r"^x\[1\]: maximum error 0.05 "):
        assert_within_rule("x", actual, plain, EXACT, (0, 1))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_breaks_the_rule(value):
    actual = EXACT.float()
    actual[0, 0] = value
    assert not any(one.kept for one in compare(actual, EXACT.float(), EXACT))
    with pytest.raises(AssertionError, match="not finite"):
        assert_within_rule("x", actual, EXACT.float(), EXACT)
