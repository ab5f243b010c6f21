"""Both backends against tensors recorded from upstream MiCo (tests/goldens/README.md)."""

import json
from functools import cache

import pytest
import torch
from models._goldens import FOLDER
from models._small import BACKENDS

from tools.parity import mico, mico_drawn
from tools.parity.recording import read_whole

CHECKS = {"mico_vit": 60, "mico_vit_eva02": 84, "mico_context": 86}


@cache
def golden(name):
    return read_whole(FOLDER / f"{name}.safetensors.xz")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CHECKS)
def test_backend_reproduces_every_recorded_tensor(name, backend, device):
    report = mico.compare(golden(name).to(device), backend)
    assert not report.failures, f"{len(report.failures)} of {report.count} failed:\n" + "\n".join(report.failures)
    assert report.count == CHECKS[name]


@pytest.mark.usefixtures("modules_on_a_cpu")
@pytest.mark.parametrize("name", CHECKS)
def test_modules_on_packed_rows_reproduce_every_recorded_tensor(name):
    test_backend_reproduces_every_recorded_tensor(name, "fused", "cpu")


@pytest.mark.parametrize("name", CHECKS)
def test_every_parameter_that_upstream_reads_has_a_recorded_gradient(name):
    recording = golden(name)
    given = {name.rpartition("grad.")[2] for name in recording.tensors if "grad." in name}
    unread = ("contra_temp", *(f"contra_head_{union}." for union in ("va", "id", "vs", "vas")))
    assert {name for name in recording.pick("param.") if not name.startswith(unread)} == given


@pytest.mark.parametrize(
    ("name", "parameter"),
    [("mico_vit", "blocks.1.attn.v_bias"), ("mico_vit_eva02", "blocks.0.mlp.ffn_ln.weight"),
     ("mico_context", "depth_frame_embedding")],
)  # fmt: skip
def test_a_wrong_parameter_is_seen(name, parameter):
    recording = golden(name)
    wrong = recording.tensors[f"param.{parameter}"].clone()
    wrong.view(-1)[3] += 1e-2
    changed = type(recording)({**recording.tensors, f"param.{parameter}": wrong}, recording.metadata)
    assert mico.compare(changed, "fused").failures


def test_recordings_of_other_sizes_are_drawn_by_their_configuration():
    config = json.loads(golden("mico_vit").metadata["config"])
    config["vision_cfg"] |= {"image_size": 42, "layers": 1, "width": 88}
    found = mico_drawn.drawn({**config, "seed": 7})
    assert found["param.pos_embed"].shape == (1, 10, 88) and found["input.eps_probe"].shape == (1, 10, 88)
    assert torch.equal(found["param.cls_token"], mico_drawn.drawn({**config, "seed": 7})["param.cls_token"])
    assert not torch.equal(found["param.cls_token"], mico_drawn.drawn({**config, "seed": 8})["param.cls_token"])
