"""Models as files: what is written is read back, and what cannot be read is refused in one line."""

import pytest
import torch
from data._refused import refused
from models._small import small_model
from safetensors.torch import load_file, save_file

from onepeace_fast import OnePeacePretrain
from onepeace_fast.models.upstream import CONFIG_FILE, WEIGHTS_FILE


def same(a: OnePeacePretrain, b: OnePeacePretrain) -> bool:
    pairs = zip(a.named_parameters(), b.named_parameters(), strict=True)
    return all(m == n and torch.equal(p, q) for (m, p), (n, q) in pairs)


def test_a_saved_model_is_loaded_unchanged(tmp_path):
    model = small_model("fused", dtype=torch.float32)
    model.save(tmp_path / "new" / "folder")
    loaded = OnePeacePretrain.load(tmp_path / "new" / "folder", backend="reference")
    assert loaded.config == model.config and same(loaded, model)
    assert loaded.encoder_wrapper.resolved_backend == "reference"
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {CONFIG_FILE, WEIGHTS_FILE}


@pytest.mark.parametrize("change", ["weight_norm", "lora"])
def test_what_load_would_refuse_is_not_written(tmp_path, change):
    model = small_model("fused", dtype=torch.float32)
    attention = model.encoder_wrapper.fusion_model.layers[0].self_attn
    if change == "weight_norm":
        torch.nn.utils.parametrizations.weight_norm(attention.q_proj)
    else:
        attention.q_proj = torch.nn.Sequential(attention.q_proj, torch.nn.Identity())
    state = torch.get_rng_state()
    parts = (", got some that load() would refuse", "q_proj", "torch.save")
    refused(lambda: model.save(tmp_path / "model"), "model: expected parameters ", *parts)
    assert not (tmp_path / "model").exists()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("tie", ["parameter", "memory"])
def test_tied_weights_are_refused_and_parts_of_one_tensor_are_written(tmp_path, tie):
    model, both = small_model("fused"), torch.randn(2, 48, 48, dtype=torch.float64)
    model.image_proj.weight.data, model.text_proj.weight.data = both
    model.save(tmp_path / "parts")
    assert same(OnePeacePretrain.load(tmp_path / "parts"), model)
    if tie == "parameter":
        model.image_proj.weight = model.text_proj.weight
    else:
        model.image_proj.weight.data = model.text_proj.weight.data
    refused(lambda: model.save(tmp_path / "tied"), "model: ", "image_proj.weight", "tied", "torch.save")
    assert not (tmp_path / "tied").exists()


def test_a_file_with_upstream_s_buffers_is_loaded_and_one_with_others_refused(tmp_path):
    model = small_model("fused", dtype=torch.float32)
    model.save(tmp_path)
    name, weights = "encoder_wrapper.text_adapter.rp_bucket", load_file(tmp_path / WEIGHTS_FILE)
    bucket = model.encoder.adapter("text").dense_table_index(1024)
    save_file(weights | {name: bucket}, tmp_path / WEIGHTS_FILE)
    assert same(OnePeacePretrain.load(tmp_path), model)
    save_file(weights | {name: bucket + 1}, tmp_path / WEIGHTS_FILE)
    refused(lambda: OnePeacePretrain.load(tmp_path), "state_dict: expected ", f"{name} differs")


def test_saving_again_replaces_the_files(tmp_path):
    first, second = (small_model("fused", dtype=torch.float32, seed=seed) for seed in (1, 2))
    first.save(tmp_path)
    second.save(tmp_path)
    assert same(OnePeacePretrain.load(tmp_path), second)


def test_a_save_that_fails_leaves_the_last_one_whole(tmp_path, monkeypatch):
    model = small_model("fused", dtype=torch.float32)
    model.save(tmp_path)

    def full_disk(tensors, path):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("onepeace_fast.models.upstream.save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        small_model("fused", dtype=torch.float32, seed=3).save(tmp_path)
    assert same(OnePeacePretrain.load(tmp_path), model)


@pytest.mark.parametrize("missing", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_folder_that_save_did_not_write_is_refused(missing, tmp_path):
    small_model("fused", dtype=torch.float32).save(tmp_path)
    (tmp_path / missing).unlink()
    refused(lambda: OnePeacePretrain.load(tmp_path), "directory: expected ", f" without {missing}")


def test_weights_that_are_cut_off_are_refused_in_one_line(tmp_path):
    small_model("fused", dtype=torch.float32).save(tmp_path)
    for size in (0, 5, 1000):
        (tmp_path / WEIGHTS_FILE).write_bytes((tmp_path / WEIGHTS_FILE).read_bytes()[:size])
        part = f"{WEIGHTS_FILE}, which cannot be read"
        refused(lambda: OnePeacePretrain.load(tmp_path), "directory: expected ", part)


@pytest.mark.parametrize("change", ["a bias less", "a parameter more"])
def test_a_parameter_too_few_or_too_many_is_not_written(tmp_path, change):
    model = small_model("fused", dtype=torch.float32)
    projection = model.text_proj
    if change == "a bias less":
        projection.register_parameter("bias", None)
    else:
        projection.factor = torch.nn.Parameter(torch.ones(1))
    told = ""
    try:
        model.save(tmp_path / "model")
    except ValueError as error:
        told = str(error)
    kind = "missing: text_proj.bias" if change == "a bias less" else "unexpected: text_proj.factor"
    assert kind in told and told.count(": text_proj") == 1
    assert not (tmp_path / "model").exists()
