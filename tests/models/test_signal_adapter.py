"""Signals: patches of equal duration at any rate, on hostile shapes, and what is refused."""

import math

import pytest
import torch
from data._refused import refused, taken
from models._added import (
    CONFIG,
    check_others_keep_their_bits,
    check_packed_is_padded,
    check_rows_stand_alone,
    extended,
)

from onepeace_fast.layers.adapters.signal import SignalAdapter, resample


def make(config):
    return SignalAdapter(config, channels=2, rate=50.0, patch=4, longest=6, bucket_size=6)


def signals(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, 2, generator=generator, dtype=torch.float64) for length in lengths]


def batch(lengths, rates=None):
    return make(CONFIG).batch("other", signals(lengths), rates or [50.0] * len(lengths))


def test_signals_leave_all_other_outputs_bitwise_alone():
    check_others_keep_their_bits(make)


@pytest.mark.parametrize("lengths", [[24, 3, 9], [1, 1, 1], [24, 24, 24], [0, 24, 4]], ids=str)
def test_signals_are_one_packed_and_padded_in_value_and_gradient(lengths):
    check_packed_is_padded(make, batch(lengths))


def test_signals_that_are_all_empty_are_their_cls():
    inputs = batch([0, 0])
    assert inputs["other"].shape == (2, 0, 2) and inputs["other_padding"].tolist() == [[False], [False]]
    outputs = extended(make).encode(**inputs)["other"]
    assert outputs.shape == (2, 1, 48)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-12)


def test_a_signal_embeds_as_it_does_alone_and_twice_the_same_twice():
    lengths = [24, 3, 9]
    check_rows_stand_alone(make, batch(lengths), [make(CONFIG).batch("other", [s], [50.0]) for s in signals(lengths)])
    twin = make(CONFIG).batch("other", signals([9]) * 2, [50.0, 50.0])
    embedded = extended(make).embed(**twin)
    torch.testing.assert_close(embedded[0], embedded[1], rtol=1e-12, atol=1e-12)


def test_a_token_is_the_patch_s_readings_times_the_weight_at_its_own_position():
    model, inputs = extended(make), batch([24, 9])
    adapter = model.encoder.adapter("other")
    embedded = adapter(inputs["other"])
    positions, linear = adapter.embed_positions, adapter.embed_patches
    for row, patch in ((0, 5), (1, 2)):
        readings = torch.cat([inputs["other"][row, 4 * patch + i] for i in range(4)])
        expected = linear.weight @ readings + linear.bias + positions[1 + patch]
        torch.testing.assert_close(embedded[row, 1 + patch], expected)
    torch.testing.assert_close(embedded[:, 0], (adapter.cls_embedding[0] + positions[:1]).expand(2, -1))


def test_the_longest_signal_is_taken():
    with taken():
        assert extended(make).encode(**batch([24]))["other"].shape == (1, 7, 48)


@pytest.mark.parametrize("rate", [25.0, 100.0, 37.5, 50.0, 1000.0])
def test_signals_of_every_rate_have_their_patches_at_the_same_seconds(rate):
    """A step at second 0.24, the end of the third patch, is there in every signal."""
    count = round(0.48 * rate)
    moments = torch.arange(count, dtype=torch.float64) / rate
    steps = (moments >= 0.24).double()[:, None].expand(-1, 2)
    inputs = make(CONFIG).batch("other", [steps], [rate])
    assert inputs["other"].shape == (1, 24, 2) and not inputs["other_padding"].any()
    torch.testing.assert_close(inputs["other"][0, :, 0], (torch.arange(24) >= 12).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("rate", "new_rate", "count"), [(3.0, 2.0, 7), (2.0, 3.0, 5), (44.1, 16.0, 50), (7, 50, 1)])
def test_a_new_reading_is_the_mean_of_the_old_ones_over_its_time(rate, new_rate, count):
    (signal,) = signals([count])
    found = resample(signal, rate, new_rate)
    assert len(found) == math.ceil(count * new_rate / rate - 1e-9)
    for k, reading in enumerate(found):
        start, stop = k * rate / new_rate, min((k + 1) * rate / new_rate, count)
        shares = [max(0.0, min(stop, i + 1) - max(start, i)) for i in range(count)]
        expected = sum(share * old for share, old in zip(shares, signal, strict=True)) / (stop - start)
        torch.testing.assert_close(reading, expected, rtol=1e-9, atol=1e-9)


def test_the_own_rate_keeps_the_bits_and_rounding_makes_no_further_reading():
    (signal,) = signals([101])
    assert torch.equal(resample(signal, 50.0, 50.0), signal)
    assert len(resample(torch.ones(3, 1), 0.3, 0.1)) == 1  # whose quotient is not 3


@pytest.mark.parametrize(
    ("given", "rates", "start", "part"),
    [
        ([], [], "other: expected at least one of signals", "got none"),
        ([torch.zeros(4, 2)], [50.0, 50.0], "rates: expected one for each of 1 signals", "got 2"),
        ([torch.zeros(4, 2), torch.zeros(4)], [50.0, 50.0], "other, signals[1]: expected float32 or float64", "[4]"),
        ([torch.zeros(4, 3)], [50.0], "other, signals[0]: expected [readings, 2]", "float32 [4, 3]"),
        ([torch.zeros(4, 2)], 50.0, "rates: expected one for each of 1 signals", "got float 50.0"),
        (3, [50.0], "other: expected a list of signals", "got int 3"),
        (torch.tensor(3.0), [50.0], "other: expected a list of signals", "got float32 [] on cpu"),
        ([torch.zeros(4, 2)], [0.0], "rates[0]: expected a positive number", "float 0.0"),
        ([torch.zeros(4, 2)], [math.inf], "rates[0]: expected a positive number", "float inf"),
        ([torch.zeros(9, 2)], [0.01], "other, signals[0]: expected up to 6 patches of 0.08 seconds", "got 11250"),
        (
            [torch.zeros(4, 2), torch.zeros(4, 2).double()],
            [50.0] * 2,
            "other: expected one dtype",
            "float32 on cpu, float64",
        ),
        ([torch.tensor([[0.0, math.nan]])], [50.0], "other, signals[0]: expected finite readings", "cut them out"),
    ],
)
def test_signals_that_do_not_fit_are_refused_by_their_place(given, rates, start, part):
    refused(lambda: make(CONFIG).batch("other", given, rates), start, part)


@pytest.mark.parametrize(
    ("shape", "dtype", "part"),
    [
        ((2, 28, 2), torch.float64, "expected at most 6 patches, got 7"),
        ((2, 7, 2), torch.float64, "readings a multiple of 4, got float64 [2, 7, 2]"),
        ((2, 8, 3), torch.float64, "expected [rows, readings, 2]"),
        ((2, 8), torch.float64, "expected float64 [rows, readings, 2]"),
        ((2, 8, 2), torch.int64, "expected float64 [rows, readings, 2], got int64"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_in_one_line(shape, dtype, part):
    refused(lambda: extended(make).embed(other=torch.zeros(shape, dtype=dtype)), "other: ", part)


@pytest.mark.parametrize(
    ("changed", "start"),
    [
        ({"rate": 0}, "rate: "),
        ({"longest": 1024}, "longest: expected an integer from 1 to 1023, got int 1024"),
        ({"longest": 2.5}, "longest: expected an integer from 1 to 1023, got float 2.5"),
        ({"bucket_size": 1}, "bucket_size: expected an integer of at least 2, got int 1"),
        ({"bucket_size": "64"}, "bucket_size: expected an integer of at least 2, got str '64'"),
        ({"patch": True}, "patch: expected an integer of at least 1, got bool True"),
        ({"rate": 10**400}, "rate: "),
        ({"patch": 0}, "patch: "),
        ({"channels": 0}, "channels: "),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_one_line(changed, start):
    refused(lambda: SignalAdapter(CONFIG, **{"channels": 2, "rate": 50.0, **changed}), start)
