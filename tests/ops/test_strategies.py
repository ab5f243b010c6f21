"""The table of strategies: what it says of a GPU, and that each strategy can be asked for."""

import pytest
import torch

from onepeace_fast.ops import _strategies
from onepeace_fast.ops._strategies import MEASURED, STRATEGIES, UNMEASURED, strategy_for

CPU = torch.device("cpu")


def test_a_gpu_that_was_not_measured_trusts_the_vendor_s_products():
    assert strategy_for("routed_ffn", CPU, 9500) == UNMEASURED == "per_modality"


def test_a_measured_gpu_takes_the_first_class_that_holds_the_rows(monkeypatch):
    classes = [{"rows": 1000, "strategy": "per_modality"}, {"rows": None, "strategy": "fused"}]
    monkeypatch.setitem(MEASURED["routed_ffn"], "A GPU", classes)
    monkeypatch.setattr(_strategies, "gpu_name", lambda device: "A GPU")
    found = {rows: strategy_for("routed_ffn", CPU, rows) for rows in (1, 1000, 1001, 65536)}
    assert found == {1: "per_modality", 1000: "per_modality", 1001: "fused", 65536: "fused"}


@pytest.mark.parametrize("operation", MEASURED)
def test_every_entry_of_the_shipped_table_can_be_looked_up(operation):
    for classes in MEASURED[operation].values():
        bounds = [entry["rows"] for entry in classes]
        assert bounds[-1] is None and bounds[:-1] == sorted(bounds[:-1])
        assert {entry["strategy"] for entry in classes} <= set(STRATEGIES)
