"""Tensors recorded from upstream, through the kernels and the grouped strategy of the FFN."""

import pytest
from models._goldens import compare, golden
from support.kernels import DEVICE
from support.tiles import small_tiles

from onepeace_fast.kernels import grouped_gemm
from onepeace_fast.ops import routed_ffn_arguments


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="recorded in float32, which a GPU's tensor cores do not multiply")
def test_every_recorded_tensor_is_reproduced_by_the_kernels(monkeypatch):
    monkeypatch.setattr(routed_ffn_arguments, "strategy_for", lambda *_: "grouped")
    launch, kernels = grouped_gemm.launch, set()

    def noted(kernel, *rest, **how):
        kernels.add(kernel.__name__)
        launch(kernel, *rest, **how)

    monkeypatch.setattr(grouped_gemm, "launch", noted)
    with small_tiles():
        report = compare(golden("flags").to(DEVICE), "fused")
    products = ("routed_ffn_hidden", "routed_ffn_output", "routed_ffn_hidden_gradient", "grouped_gradients")
    assert {f"{product}_kernel" for product in products} <= kernels
    assert not report.failures, f"{len(report.failures)} of {report.count} failed:\n" + "\n".join(report.failures)
    assert report.count > 400
