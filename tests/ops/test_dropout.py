"""Dropout's random numbers: Philox-4x32-10 from a seed and an element's place alone."""

import math
import random

import pytest
import torch
from support import naive

from onepeace_fast import residual, residual_layer_norm
from onepeace_fast.ops.dropout import dropout_factor, philox

KNOWN_ANSWERS = [  # Random123's kat_vectors, philox4x32 with 10 rounds: counter, key, output
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def mask_of(seed: int, rows: int, width: int, probability: float) -> torch.Tensor:
    """Which elements of a branch of ones pass, through the public op."""
    x = torch.zeros(rows, width)
    return residual(x, torch.ones(rows, width), dropout=probability, seed=torch.tensor(seed)) != 0


@pytest.mark.parametrize("counter, key, answer", KNOWN_ANSWERS)
def test_the_python_philox_gives_the_published_answers(counter, key, answer):
    assert naive.philox(key[0] | key[1] << 32, counter) == answer


def test_the_library_gives_the_published_answer_for_zero():
    assert philox(torch.tensor(0), torch.tensor([0])).item() == 0x6627E8D5


def test_the_library_equals_the_python_philox_for_64_bit_seeds_and_counters():
    generator = random.Random(1)
    seeds = [0, 1, -1, 2**32 - 1, 2**32, 2**63 - 1, -(2**63), *(generator.randrange(2**62) for _ in range(5))]
    counters = [0, 1, 2**32 - 1, 2**32, 2**63 - 1, *(generator.randrange(2**62) for _ in range(20))]
    for seed in seeds:
        expected = [naive.philox(seed % 2**64, (c & 0xFFFFFFFF, c >> 32, 0, 0))[0] for c in counters]
        assert philox(torch.tensor(seed), torch.tensor(counters)).tolist() == expected


def test_an_element_s_number_is_that_of_its_row_major_place():
    seed = torch.tensor(77)
    factor = dropout_factor(seed, torch.Size((5, 7)), 0.3)
    assert factor.dtype == torch.float32
    torch.testing.assert_close(factor, naive.dropout_factor(77, 5, 7, 0.3), rtol=1e-6, atol=0)
    assert torch.equal(factor.flatten(), dropout_factor(seed, torch.Size((1, 35)), 0.3).flatten())


def test_the_same_seed_gives_the_same_mask_and_another_seed_another():
    first = mask_of(3, 20, 30, 0.5)
    assert torch.equal(mask_of(3, 20, 30, 0.5), first)
    for other in (2, 4, 3 + 2**32, 3 + 2**40):
        agreement = (mask_of(other, 20, 30, 0.5) == first).float().mean().item()
        assert 0.38 < agreement < 0.62, f"seed {other} agrees with seed 3 in {agreement:.0%}"


@pytest.mark.parametrize("probability", (0.05, 0.5, 0.9))
def test_the_rate_of_kept_elements_is_right_and_the_mean_is_kept(probability):
    rows, width = 400, 250
    factor = dropout_factor(torch.tensor(11), torch.Size((rows, width)), probability)
    deviation = math.sqrt(probability * (1 - probability) / (rows * width))
    kept = factor != 0
    assert abs(kept.float().mean().item() - (1 - probability)) < 4.5 * deviation
    for dimension, count in ((0, rows), (1, width)):  # no row or column is special
        rates = kept.float().mean(dimension) - (1 - probability)
        assert rates.abs().max().item() < 5.5 * math.sqrt(probability * (1 - probability) / count)
    assert torch.equal(factor[kept], torch.full_like(factor[kept], 1 / (1 - probability)))


@pytest.mark.parametrize("norm", (False, True), ids=("residual", "residual_layer_norm"))
def test_the_backward_pass_drops_the_same_elements(norm):
    seed, probability = torch.tensor(5), 0.4
    y = torch.ones(9, 11, requires_grad=True)
    x = torch.zeros(9, 11, requires_grad=True)
    if norm:
        out, _ = residual_layer_norm(x, y, None, torch.ones(11), dropout=probability, seed=seed)
    else:
        out = residual(x, y, dropout=probability, seed=seed)
    out.sum().backward()
    assert torch.equal(y.grad, out.detach()) and torch.equal(x.grad, torch.ones_like(x))
    assert set(y.grad.flatten().tolist()) == {0.0, torch.tensor(1 / 0.6).item()}


def test_a_probability_of_zero_needs_no_seed_and_drops_nothing():
    y = torch.randn(4, 5)
    assert torch.equal(residual(torch.zeros(4, 5), y, dropout=0.0), y)
