"""Both backends against tensors recorded from upstream ONE-PEACE (tests/goldens/README.md)."""

import pytest
import torch
from goldens.reduce import quantise
from models._goldens import Report, compare, golden
from models._small import BACKENDS

# State dict + buffers + outputs and embeddings + losses + gradients.
CHECKS = {"tiny": 179 + 3 + 17 + 11 + 215, "flags": 177 + 3 + 17 + 11 + 246, "perlayer": 218 + 3 + 17 + 11 + 312}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CHECKS)
def test_backend_reproduces_every_recorded_tensor(name, backend, device):
    report = compare(golden(name).to(device), backend)
    assert not report.failures, f"{len(report.failures)} of {report.count} failed:\n" + "\n".join(report.failures)
    assert report.count == CHECKS[name]


@pytest.mark.usefixtures("modules_on_a_cpu")
@pytest.mark.parametrize("name", CHECKS)
def test_modules_on_packed_rows_reproduce_every_recorded_tensor(name):
    test_backend_reproduces_every_recorded_tensor(name, "fused", "cpu")


@pytest.mark.parametrize("name", CHECKS)
def test_embedding_rows_that_no_input_reads_are_nan_in_the_recordings(name):
    """So the tests above also prove that no output, loss or gradient depends on them."""
    parameters = golden(name).pick("param.")
    partly = {key: value.isnan().any(1) for key, value in parameters.items() if value.isnan().any()}
    assert len(partly) == 4
    assert all("embed_positions" in key or "embed_tokens" in key for key in partly)
    assert all(0 < int(rows.sum()) < rows.shape[0] for rows in partly.values())


@pytest.mark.parametrize("magnitude", [1e-12, 1.0, 1e6])
def test_a_quantised_gradient_is_off_by_less_than_16_millionths_of_its_largest_entry(magnitude):
    gradient = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * magnitude
    integers, scale = quantise(gradient)
    error = (integers.double() * scale.double() - gradient.double()).abs().max() / gradient.abs().max()
    assert 1e-6 < error < 1.6e-5
    assert integers.dtype == torch.int16
    assert not quantise(torch.zeros(3))[0].any()


def test_a_check_fails_on_a_small_error_a_nan_another_shape_and_nothing():
    want = torch.linspace(-1, 1, 100)
    wrong = [want + 2e-4, want.clone().fill_(torch.nan), want[:99], None]
    for got in wrong:
        report = Report()
        report.check("x", got, want, 1e-4)
        assert (report.count, len(report.failures)) == (1, 1)
        report.check("x", want + 5e-5, want, 1e-4)
        assert (report.count, len(report.failures)) == (2, 1)


def test_bits_differ_by_a_last_place_and_agree_at_nan():
    want = torch.tensor([1.0, torch.nan, 3.0])
    for got, failures in ((want.clone(), 0), (want + 2e-7, 1), (want.nan_to_num(), 1), (want[:2], 1), (None, 1)):
        report = Report()
        report.check_bits("x", got, want)
        assert len(report.failures) == failures


@pytest.mark.parametrize("name", CHECKS)
def test_every_kind_of_parameter_has_a_recorded_gradient_that_is_not_zero(name):
    recording = golden(name)
    gradients = [entry for kind in ("vl", "al") for entry in recording.pick(f"grad.{kind}.").items()]
    nonzero = {key for key, value in gradients if value.any()}
    for part in ("rel_pos_table", "embed_positions", "cls_embedding", "norm", "mask_token", "self_attn", "ffn", "proj"):
        assert any(part in key for key in nonzero), part
    tables = {key for key, _ in gradients if "rel_pos_table" in key}
    assert len(tables) == 3 * recording.config.encoder.bias_tables and tables <= nonzero
