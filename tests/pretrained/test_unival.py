"""UnIVAL's files: settings as arguments, weights with networks, there and back."""

from argparse import Namespace
from collections import OrderedDict

import pytest
import torch
from data._refused import refused, taken
from models._unival import SOURCE, TARGET, refusal, unival
from models.test_unival_networks import RAW, SAMPLES, fill
from pretrained._files import checkpoint_of, write
from safetensors.torch import save_file

from onepeace_fast import Unival, from_pretrained
from onepeace_fast.models.unival.state import CONSTANTS, TABLE, TIED, buffer

SIZES = {"image_blocks": (3, 4, 6, 3), "video_blocks": (3, 4, 6, 3), "feature_channels": 512, "audio_hop": 320}
BUFFERS = [f"{stack}.{kind}" for stack in ("encoder", "decoder") for kind in ("version", "token_rp_bucket")]
BUFFERS += ["encoder.image_rp_bucket", "decoder.image_rp_bucket", "decoder.image_position_idx"]


def small(networks=False, **changed):
    sizes = {**SIZES, "networks": True} if networks else {}
    return fill(unival("reference", torch.float32, **{**sizes, **changed}))


def file_of(model, as_args=False, change=None, **more):
    """What fairseq's trainer saves: all arguments in one namespace, those of the trainer and of the task among them."""
    args = {**model.config.to_upstream(), "lr": [1e-4], "image_dir": "/data", "no_progress_bar": True, "seed": 7}
    args |= {"freeze_encoder_embedding": False, **(change or {})}
    state = OrderedDict(model.to_upstream_state_dict())
    state |= {name: buffer(model.config, name) for name in BUFFERS}
    saved = {"args": Namespace(**args), "cfg": None} if as_args else {"args": None, "cfg": {"model": Namespace(**args)}}
    return {**saved, "model": {**state, **more}, "extra_state": {}, "last_optimizer_state": {"state": {}}}


def holds(model, state):
    own = model.to_upstream_state_dict()
    return all(own[name].dtype == state[name].dtype and torch.equal(own[name], state[name]) for name in own)


@pytest.fixture(scope="module")
def with_networks():
    return small(networks=True)


@pytest.mark.parametrize("as_args", [False, True])
def test_a_checkpoint_goes_there_and_back_bit_for_bit(tmp_path, as_args):
    model = small()
    values = file_of(model, as_args)
    loaded = from_pretrained(write(tmp_path / "unival.pt", values, zipped=not as_args))
    assert type(loaded) is Unival and not loaded.training and loaded.config == model.config
    assert holds(loaded, values["model"])
    assert torch.equal(loaded.loss(SOURCE, TARGET), model.loss(SOURCE, TARGET))
    report = loaded.load_report
    assert not (report.unknown or report.left_out or report.fresh or report.resampled or report.copied)
    again = from_pretrained(write(tmp_path / "again.pt", file_of(loaded)), model_type="unival", backend="fused")
    assert holds(again, values["model"]) and again.backend == "fused"


@pytest.mark.parametrize("dtype", [None, "bf16"])
def test_networks_come_with_their_running_statistics(tmp_path, with_networks, dtype):
    values = file_of(with_networks)
    assert set(CONSTANTS) <= set(values["model"])
    loaded = from_pretrained(write(tmp_path / "a.pt", values), dtype=dtype)
    assert loaded.config == with_networks.config and not loaded.load_report.unknown
    own = loaded.to_upstream_state_dict()
    for name, value in values["model"].items():
        if name not in {*CONSTANTS, *BUFFERS}:
            wanted = value.bfloat16() if dtype and value.is_floating_point() else value
            assert own[name].dtype == wanted.dtype and torch.equal(own[name], wanted), name
    if dtype is None:
        raw = {name: x.float() for name, x in RAW.items()}
        losses = [model.loss(SOURCE, TARGET, samples=SAMPLES, **raw) for model in (with_networks, loaded)]
        assert torch.equal(*losses)


def test_frozen_norms_count_no_batches(tmp_path, with_networks):
    values = file_of(with_networks, change={"freeze_resnet": True})
    counts = [name for name in values["model"] if name.endswith("num_batches_tracked") and "images" in name]
    for name in counts:
        del values["model"][name]
    loaded = from_pretrained(write(tmp_path / "a.pt", values))
    assert loaded.load_report.unknown == ["model.freeze_resnet"] and counts
    assert loaded.encoder.embed_images.bn1.num_batches_tracked.item() == 0


def test_the_report_names_what_was_not_followed_and_what_was_left_out(tmp_path):
    model = small()
    change = {"freeze_encoder": True, "encoder_novelty": 3, "video_mean": 2, "type_embedding": 1}
    head = {"classification_heads.vqa.dense.weight": torch.zeros(3, 3)}
    loaded = from_pretrained(write(tmp_path / "a.pt", file_of(model, change=change, **head)))
    report = loaded.load_report
    assert report.unknown == ["model.encoder_novelty", "model.freeze_encoder", "model.type_embedding"]
    assert report.left_out == [*head] and str(report).startswith(f"Unival from {tmp_path / 'a.pt'}\n  unknown settings")


def test_the_moving_average_is_taken_where_it_is_asked_for(tmp_path):
    model = small()
    values = file_of(model)
    average = {name: value + 1 if value.is_floating_point() and "version" not in name else value
               for name, value in values["model"].items()}  # fmt: skip
    path = write(tmp_path / "a.pt", {**values, "extra_state": {"ema": average}})
    assert holds(from_pretrained(path, ema=True), average) and holds(from_pretrained(path), values["model"])


def changed(**changes):
    return lambda model: file_of(model, change=changes)


def without(name):
    def made(model):
        values = file_of(model)
        del values["model"][name]
        return values

    return made


REFUSED = {
    "another model": (changed(scale_resids=True), {}, "scale_resids: expected False, got True; UnIVAL's own scripts"),
    "layers unlike the weights": (changed(encoder_layers=3), {}, "missing: encoder.image_rel_pos_table_list.2.weight"),
    "no arguments": (lambda model: {"model": file_of(model)["model"], "cfg": {"model": {}}}, {},
                     "cfg: expected upstream's arguments with encoder_embed_dim, under cfg.model or args, got none"),
    "a missing weight": (without("decoder.layers.1.fc1.bias"), {}, "missing: decoder.layers.1.fc1.bias"),
    "a weight of integers": (lambda model: file_of(model, **{"encoder.layer_norm.weight": torch.ones(16).long()}), {},
                             "misshaped or different: encoder.layer_norm.weight int64 instead of floating point"),
    "an unknown weight": (lambda model: file_of(model, **{"encoder.prompt": torch.zeros(2)}), {},
                          "unexpected: encoder.prompt"),
    "another bucket": (lambda model: file_of(model, **{"encoder.token_rp_bucket": torch.zeros(2, 2)}), {},
                       "encoder.token_rp_bucket differs from the one that follows from the configuration"),
    "a table of another shape": (lambda model: file_of(model, **{TABLE: torch.zeros(23)}), {},
                                 f"{TABLE}: expected a matrix, got [23]"),
    "a kind of ONE-PEACE": (file_of, {"model_type": "retrieval"},
                            "model_type: expected 'unival' or None for a file of UnIVAL's, got 'retrieval'"),
    "an image's size": (file_of, {"image_size": 64}, "image_size: expected none for a file of UnIVAL's, got 64"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_in_a_line_that_names_the_file(tmp_path, name):
    make, options, says = REFUSED[name]
    path = write(tmp_path / "a.pt", make(small()))
    line = refusal(lambda: from_pretrained(path, **options))
    assert line.startswith(f"{path}: ") and says in line and "\n" not in line


def test_a_folder_of_a_training_is_read_too(tmp_path):
    model = small()
    state = model.to_upstream_state_dict()
    model.config.save(tmp_path / "config.json")
    save_file({name: value for name, value in state.items() if name not in TIED}, tmp_path / "model.safetensors")
    with taken():
        loaded = from_pretrained(tmp_path, backend="fused")
        half = from_pretrained(str(tmp_path), model_type="unival", dtype="bf16")
    assert type(loaded) is Unival and not loaded.training and loaded.config == model.config
    assert (
        holds(loaded, state) and loaded.backend == "fused" and {p.dtype for p in half.parameters()} == {torch.bfloat16}
    )
    says = f"{tmp_path}: image_size: expected none for a file of UnIVAL's, got 64"
    assert refusal(lambda: from_pretrained(tmp_path, image_size=64)) == says


def test_one_peace_s_file_is_not_unival(tmp_path):
    from models._encoder_only import retrieval

    path = write(tmp_path / "a.pt", checkpoint_of(retrieval("text")))
    says = "model_type: expected weights of unival, or one of pretrain, retrieval, classify, encoder, got logit_scale"
    refused(lambda: from_pretrained(path, model_type="unival"), f"{path}: ", says)


def test_arguments_are_upstream_s_for_its_depths_alone():
    refused(lambda: small(networks=True, image_blocks=(1, 1, 1, 1)).config.to_upstream(), "",
            "image_blocks: expected one of (3, 4, 6, 3), (3, 4, 23, 3), (3, 8, 36, 3), got (1, 1, 1, 1)")  # fmt: skip
