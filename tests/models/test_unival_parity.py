"""Both backends against tensors recorded from upstream UnIVAL (tests/goldens/README.md)."""

from functools import cache

import pytest
from models._goldens import FOLDER
from models._small import BACKENDS

from tools.parity import unival
from tools.parity.recording import read_whole

CHECKS = {"unival_tiny": 295, "unival_tiny_mid": 25, "unival_tiny_grads_text_code": 386}


@cache
def golden(name):
    return read_whole(FOLDER / f"{name}.safetensors.xz")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CHECKS)
def test_backend_reproduces_every_recorded_tensor(name, backend, device):
    report = unival.compare(golden(name).to(device), backend)
    assert not report.failures, f"{len(report.failures)} of {report.count} failed:\n" + "\n".join(report.failures)
    assert report.count == CHECKS[name]


@pytest.mark.usefixtures("modules_on_a_cpu")
def test_modules_on_packed_rows_reproduce_every_recorded_tensor():
    test_backend_reproduces_every_recorded_tensor("unival_tiny_grads_text_code", "fused", "cpu")


def test_every_parameter_has_a_recorded_gradient():
    named = [name.split(".", 3) for file in CHECKS for name in golden(file).tensors if "grad." in name]
    given = {parts[3] for parts in named if parts[1] == "grad"} | {
        ".".join(parts[2:]) for parts in named if parts[0] == "grad"
    }
    assert set(golden("unival_tiny").pick("param.")) <= given


@pytest.mark.parametrize("name", ["encoder.layers.1.attn_ln.bias", "decoder.layers.0.encoder_attn.q_proj.weight"])
def test_a_wrong_parameter_is_seen(name):
    recording = golden("unival_tiny_mid")
    wrong = recording.tensors[f"param.{name}"].clone()
    wrong[3] += 1e-3
    changed = type(recording)({**recording.tensors, f"param.{name}": wrong}, recording.metadata)
    assert unival.compare(changed, "fused").failures
