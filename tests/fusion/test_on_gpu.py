"""Each family's stand-in, fused on a GPU, against its own code on the CPU."""

from __future__ import annotations

import pytest
import torch

from onepeace_fast import fuse
from tests.fusion import _bagel, _mixture_of_transformers, _t5, _windows, test_one_peace, test_torchscale
from tests.fusion._checks import Batch, Case, run, widened

pytestmark = pytest.mark.gpu

CASES = {
    "ONE-PEACE": test_one_peace.case("vl", tables=2),
    "ONE-PEACE, some visible": test_one_peace.case("al", visible=True),
    "torchscale": test_torchscale.case(),
    "BAGEL": _bagel.CASE,
    "Mixture-of-Transformers": _mixture_of_transformers.CASE,
    "T5": _t5.case("t5"),
    "Swin": _windows.CASES["swin"],
    "BEiT": _windows.CASES["beit"],
}


def on_gpu(batch: Batch, dtype: torch.dtype) -> Batch:
    return {name: moved(value, dtype) for name, value in batch.items()}


def moved(value: object, dtype: torch.dtype) -> object:
    if isinstance(value, torch.Tensor):
        return value.to("cuda", dtype if value.is_floating_point() else value.dtype)
    return [moved(one, dtype) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-6), (torch.float32, 1e-3)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_fused_model_gives_the_cpus_outputs_and_gradients(case: Case, dtype: torch.dtype, allowed: float) -> None:
    model, batch = case.make().double(), widened(case.batch(0))
    expected = run(case, model, batch)
    handle = fuse(model)
    found = run(case, model.to("cuda", dtype), on_gpu(batch, dtype))
    assert all(part.fused_calls > 0 for part in handle.report().parts), str(handle.report())
    assert {name for name, value in found.items() if value is None} == {n for n, v in expected.items() if v is None}
    for name, value in found.items():
        if value is not None:
            size = max(1.0, expected[name].abs().max().item())
            torch.testing.assert_close(value.cpu().double(), expected[name], rtol=0, atol=allowed * size, msg=name)
