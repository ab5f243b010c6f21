"""The demo's comparison of the backends: that it finds them equal, and would tell where they differ."""

import math

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("scipy")

from onepeace_fast.demo import comparison
from onepeace_fast.layers.side_by_side import DenseRoute


@pytest.fixture(scope="module")
def batches(digits, spoken, vocabulary):
    return comparison.pair_batches(digits[1], spoken[1], vocabulary, pairs=8)


def test_pairs_hold_each_kind_with_its_caption(digits, spoken, vocabulary, monkeypatch):
    monkeypatch.setattr(comparison, "ROWS", 6)
    batches = comparison.pair_batches(digits[1], spoken[1], vocabulary, pairs=10)
    kinds = [("image", 6), ("image", 4), ("audio", 6), ("audio", 4)]
    assert [(next(name for name in batch if name != "text"), len(batch["text"])) for batch in batches] == kinds


def test_both_backends_agree(model, batches):
    found = comparison.compare(model, "cpu", batches)
    assert found.agree and found.device == "cpu"
    assert 0 < found.largest_difference <= comparison.AGREEMENT * found.largest_value
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_fault_in_a_gradient_alone_is_found(model, batches, monkeypatch):
    attend = DenseRoute.attend

    def scaled(route, q, k, v, *arguments):
        return attend(route, q, k, 1.01 * v - 0.01 * v.detach(), *arguments)

    monkeypatch.setattr(DenseRoute, "attend", scaled)
    found = comparison.compare(model, "cpu", batches)
    assert not found.agree and found.largest_difference > comparison.AGREEMENT * found.largest_value


def test_a_value_that_is_no_number_disagrees(model, batches, monkeypatch):
    results = comparison._results

    def spoiled(model, batches, backend):
        found = results(model, batches, backend)
        if backend == "fused":
            found["encoder outputs"][0][0, 0] = math.nan
        return found

    monkeypatch.setattr(comparison, "_results", spoiled)
    found = comparison.compare(model, "cpu", batches)
    assert not found.agree and math.isnan(found.largest_difference)
