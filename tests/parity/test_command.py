"""python -m tools.parity: what it prints, counts and returns."""

import functools
import json
import lzma
import re
from pathlib import Path

import pytest
import torch
from parity import _synthetic as synthetic
from safetensors.torch import save

from tools.parity.__main__ import KINDS, main

BUCKETS = '{"token_bucket_size": 4, "image_bucket_size": 2}'
GOLDENS = Path(__file__).resolve().parent.parent / "goldens"
CHECKS = {
    "mico_context": 172, "mico_vit": 120, "mico_vit_eva02": 168,
    "mot_ffn": 146, "onepeace_flags": 908, "onepeace_perlayer": 1122, "onepeace_tiny": 850, "torchscale_bias": 4,
    "torchscale_multiway": 244, "unival_bias": 10, "unival_tiny": 590, "unival_tiny_grads_text_code": 772,
    "unival_tiny_mid": 50,
}  # fmt: skip


@functools.cache
def small() -> tuple[dict, dict]:
    recording = synthetic.multiway()
    return recording.tensors, recording.metadata


def written(folder: Path, tensors: dict, metadata: dict, compressed: bool = False) -> str:
    path, raw = folder / "small.safetensors", save(tensors, metadata=metadata)
    if compressed:
        path, raw = folder / "small.safetensors.xz", lzma.compress(raw)
    path.write_bytes(raw)
    return str(path)


def output(capsys, *arguments: str) -> tuple[int, list[str]]:
    code = main(arguments)
    return code, capsys.readouterr().out.splitlines()


def test_a_recording_of_this_repository_passes(capsys):
    path = GOLDENS / "torchscale_multiway.safetensors.xz"
    assert output(capsys, str(path)) == (0, [f"{CHECKS['torchscale_multiway']} passed, 0 failed"])


@pytest.mark.slow
def test_every_recording_of_this_repository_passes(capsys):
    paths = sorted(GOLDENS.glob("*.xz"))
    assert [path.name.partition(".")[0] for path in paths] == [*CHECKS]
    for path in paths:
        assert output(capsys, str(path)) == (0, [f"{CHECKS[path.name.partition('.')[0]]} passed, 0 failed"])


def test_files_add_up_and_a_failure_is_a_line_for_each_backend(tmp_path, capsys):
    tensors, metadata = small()
    good = written(tmp_path, tensors, metadata, compressed=True)
    code, lines = output(capsys, good)
    assert (code, lines) == (0, ["188 passed, 0 failed"])
    name = "grad.split.layers.1.ffn.B.fc2.weight"
    wrong = tensors[name].clone()
    wrong[3, 5] += 1e-3 * wrong.abs().max()
    bad = written(tmp_path, {**tensors, name: wrong}, metadata)
    code, lines = output(capsys, bad, good)
    assert code == 1
    assert lines[-1] == "374 passed, 2 failed"
    pattern = r"FAIL {}, {}: {}: off by \S+e-\d\d where the largest magnitude is \S+"
    assert len(lines) == 3
    for line, backend in zip(lines, ("reference", "fused"), strict=False):
        assert re.fullmatch(pattern.format(re.escape(bad), backend, re.escape(name)), line), line


def without(name: str) -> tuple[dict, dict]:
    tensors, metadata = small()
    return {key: value for key, value in tensors.items() if key != name}, metadata


def configured(**changed: object) -> tuple[dict, dict]:
    tensors, metadata = small()
    config = json.loads(metadata["effective_config"]) | changed
    return tensors, metadata | {"effective_config": json.dumps(config)}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: (small()[0], {"upstream": "x/y"}), f"expected a recording of one of {', '.join(KINDS)}, got x/y"),
        (lambda: (small()[0], {"a": "b"}), f"expected a recording of one of {', '.join(KINDS)}, got no upstream"),
        (lambda: (small()[0], {"upstream": "mshukor/UnIVAL", "config": BUCKETS}), "expected the cases text, image, "
         "image_sampled, video, audio, code, got allA, allB, caption, eps_probe, split"),
        (lambda: without("out.split.encoder_out"), "expected the tensor out.split.encoder_out, got a recording "
         "without it"),
        (lambda: without("grad.split.layer_norm.A.bias"), "expected the tensor grad.split.layer_norm.A.bias, got "
         "a recording without it"),
        (lambda: without("param.layer_norm.B.bias"), "expected the tensor param.layer_norm.B.bias, got a "
         "recording without it"),
        (lambda: configured(subln=False), "expected subln True in effective_config, got False"),
        (lambda: (small()[0], {**small()[1], "effective_config": "{"}), "expected JSON in the metadata "
         "effective_config, got"),
        (lambda: ({**small()[0], "out.other.encoder_out": torch.ones(1)}, small()[1]), "expected of out. encoder_out "
         "of split, allA, allB, caption, eps_probe, got other.encoder_out"),
        (lambda: ({**small()[0], "mid.more": torch.ones(1)}, small()[1]), "mid.more: recorded, and compared with "
         "nothing"),
        (lambda: ({"scale.out.x": torch.ones(())}, {}), "expected the tensor out.x, got its scale alone"),
        (lambda: ({"first.input.x": torch.ones(8)}, small()[1]), "expected torch to draw the recorded "
         "input.eps_probe, got other numbers"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused_in_a_line_and_counted(make, says, tmp_path, capsys):
    code, lines = output(capsys, written(tmp_path, *make()))
    assert code == 1
    assert says in lines[0]
    assert int(lines[-1].split()[2]) == len(lines) - 1 > 0


@pytest.mark.parametrize("name", ("none.safetensors", "cut.safetensors", "cut.safetensors.xz"))
def test_a_missing_and_a_damaged_file_are_refused_and_the_others_run(name, tmp_path, capsys):
    good = Path(written(tmp_path, *small(), compressed=name.endswith("xz")))
    path = tmp_path / name
    if name.startswith("cut"):
        path.write_bytes(good.read_bytes()[:1000])
    code, lines = output(capsys, str(path), str(good))
    assert code == 1
    wanted = "safetensors, whole or as .xz, got a damaged file" if name.startswith("cut") else "a file to read, got No"
    assert lines[0].startswith(f"FAIL {path}: expected {wanted}")
    assert lines[1:] == ["188 passed, 1 failed"]
