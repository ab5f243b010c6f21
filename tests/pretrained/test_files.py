"""Upstream's files become models with exactly their parameters, and go back to upstream's names bit for bit."""

import logging
import pickle
import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from data._refused import refused
from models._encoder_only import classify, retrieval, vision
from models._small import audio_batch, image_batch, small_model, text_batch
from models.test_add_modality import SensorAdapter
from pretrained._files import checkpoint_of, settings_of, state_of, write, write_vision

import onepeace_fast
from onepeace_fast import OnePeaceClassify, OnePeaceEncoder, OnePeacePretrain, OnePeaceRetrieval, from_pretrained
from onepeace_fast.config import ImageAdapterConfig, TextAdapterConfig
from onepeace_fast.pretrained import weights


def parameters(model):
    return dict(model.to_upstream_state_dict())


def holds(model, state):
    """Whether a model has exactly these values, in their dtypes."""
    own = parameters(model)
    return all(own[name].dtype == state[name].dtype and torch.equal(own[name], state[name]) for name in own)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pretraining_checkpoint_goes_there_and_back_bit_for_bit(tmp_path, zipped, dtype):
    model = small_model("reference")
    values = checkpoint_of(model, dtype=dtype)
    loaded = from_pretrained(write(tmp_path / "one-peace.pt", values, zipped))
    assert type(loaded) is OnePeacePretrain and not loaded.training
    assert holds(loaded, values["model"]) and set(parameters(loaded)) == set(parameters(model))
    loaded.save(tmp_path / "ours")
    again = from_pretrained(tmp_path / "ours")
    assert holds(again, values["model"]) and again.config == loaded.config


def test_a_loaded_model_computes_what_the_saved_one_did(tmp_path):
    model = small_model("fused").to(torch.float32)
    loaded = from_pretrained(write(tmp_path / "a.pt", checkpoint_of(model)), backend="fused", device="cpu")
    audio, padding = audio_batch([5, 9], dtype=torch.float32)
    image = image_batch(2, 3, dtype=torch.float32)
    for inputs in ({"text": text_batch([3, 7])}, {"image": image}, {"audio": audio, "audio_padding": padding}):
        assert torch.equal(loaded.embed(**inputs), model.embed(**inputs))
    assert loaded.encoder.backend == "fused"


def test_retrieval_and_classification_checkpoints_are_models_of_their_kind(tmp_path):
    typed = {"text": TextAdapterConfig(bucket_size=6, type_embedding=True)}
    typed["image"] = ImageAdapterConfig(position_grid=3, bias_grid=4, type_embedding=True)
    made = {
        OnePeaceRetrieval: [retrieval("text", "image"), retrieval("audio", "text", bias_table_per_layer=True)],
        OnePeaceClassify: [
            classify("text", "image", head={"two_images": True, "use_image_features": True}, **typed),
            classify("audio", head={"pooler": True, "pooler_dropout": 0.2, "attention_pooling": False}),
        ],
    }
    for kind, models in made.items():
        for number, model in enumerate(models):
            values = checkpoint_of(model)
            loaded = from_pretrained(write(tmp_path / f"{kind.__name__}{number}.pt", values))
            assert type(loaded) is kind and holds(loaded, values["model"])
            modalities = model.config.encoder.modalities
            assert loaded.config.encoder.modalities == modalities
            others = (
                {"encoder"} if "text" in modalities else {"encoder", "vocab_size"}
            )  # whose file shows no vocabulary
            fields, expected = vars(loaded.config), vars(model.config)
            assert all(fields[name] == expected[name] for name in set(expected) - others)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_the_vision_pickle_is_an_encoder_of_images(tmp_path, protocol):
    whole = small_model("reference", dtype=torch.float32)
    loaded = from_pretrained(write_vision(tmp_path / "one-peace-vision.pkl", whole, protocol))
    assert type(loaded) is OnePeaceEncoder and loaded.config.encoder.modalities == ("image",)
    assert holds(loaded, state_of(whole)) and not loaded.load_report.fresh
    expected = vision("reference").to(torch.float32)
    expected.load_state_dict(loaded.state_dict())
    image = image_batch(2, 3, dtype=torch.float32)
    assert torch.equal(loaded.encode(image=image)["image"], expected.encode(image=image)["image"])


@pytest.mark.parametrize("asked, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16), (torch.float64,) * 2])
def test_every_parameter_gets_the_dtype_that_is_asked_for(tmp_path, asked, dtype):
    values = checkpoint_of(retrieval("text", "image"))
    loaded = from_pretrained(write(tmp_path / "a.pt", values), dtype=asked)
    assert all(torch.equal(value, values["model"][name].to(dtype)) for name, value in parameters(loaded).items())
    assert {value.dtype for value in loaded.parameters()} == {dtype}


def test_the_moving_average_is_taken_where_it_is_asked_for(tmp_path):
    values = checkpoint_of(retrieval("text"))
    average = {name: value + 1 if value.is_floating_point() else value for name, value in values["model"].items()}
    average["encoder_wrapper.fusion_model.version"] = torch.Tensor([3])
    path = write(tmp_path / "a.pt", values)
    refused(lambda: from_pretrained(path, ema=True), f"{path}: ema: ", "['metrics', 'val_loss']")
    write(path, {**values, "extra_state": {"ema": average}})
    assert holds(from_pretrained(path, ema=True), average) and holds(from_pretrained(path), values["model"])


@pytest.mark.parametrize("kind", ["retrieval", "one_peace_retrieval", "encoder"])
def test_a_pretraining_checkpoint_becomes_a_smaller_model(tmp_path, kind):
    values = checkpoint_of(small_model("reference"))
    loaded = from_pretrained(write(tmp_path / "a.pt", values), model_type=kind)
    assert loaded.config.kind == kind.removeprefix("one_peace_") and holds(loaded, values["model"])
    encoder = {name for name in values["model"] if name.startswith("encoder_wrapper.")}
    assert set(loaded.load_report.left_out) == set(values["model"]) - encoder - set(parameters(loaded))
    assert "decoder_wrapper (" in str(loaded.load_report) and "text_mask_token" in str(loaded.load_report)


def test_a_new_head_is_fresh_and_reported_and_each_layer_gets_the_one_table(tmp_path):
    values = checkpoint_of(small_model("reference"))
    path = write(tmp_path / "a.pt", values)
    head = {"classes": 7, "head_width": 20, "attention_pooling": True}
    loaded = from_pretrained(path, model_type="classify", head=head)
    report, state = loaded.load_report, values["model"]
    assert report.fresh == [name for name in parameters(loaded) if name.startswith("classify_head.")]
    assert loaded.classify_head.classifier[3].weight.std() > 0
    for name in ("text", "image", "audio"):
        table = f"encoder_wrapper.{name}_adapter.rel_pos_table_list"
        for layer in range(2):
            assert torch.equal(parameters(loaded)[f"{table}.{layer}.weight"], state[f"{table}.0.weight"])
        assert f"{table}.0.weight" in report.copied
    two = loaded.encoder.text_adapter.rel_pos_table_list
    assert two[0].weight.data_ptr() != two[1].weight.data_ptr()
    assert {"fresh", "copied"} <= {word for word in str(report).replace(":", "").split()}
    refused(lambda: from_pretrained(path, model_type="classify"), f"{path}: head: ", "'classes'")
    refused(lambda: from_pretrained(path, model_type="classify", head={"classes": 2}), f"{path}: head: ", "head_width")
    refused(lambda: from_pretrained(path, head=head), f"{path}: head: expected none for a pretrain model")


def test_a_retrieval_checkpoint_that_copies_tables_gets_one_for_each_layer(tmp_path):
    values = checkpoint_of(retrieval("text", "image"), copies=True)
    old = {name.replace("rel_pos_table_list.0", "rel_pos_table"): value for name, value in values["model"].items()}
    for state in (values["model"], old):
        loaded = from_pretrained(write(tmp_path / "a.pt", {**values, "model": state}))
        assert loaded.config.encoder.bias_tables == 2 and len(loaded.load_report.copied) == 2


def test_settings_that_are_unknown_are_listed_and_those_that_are_wrong_refused(tmp_path, caplog):
    values = checkpoint_of(retrieval("text"))
    model = values["cfg"]["model"]
    model["xformers"] = True
    model["encoder"]["new_thing"] = 1
    model["encoder"]["text_adapter"]["other"] = None
    with caplog.at_level(logging.WARNING):
        loaded = from_pretrained(write(tmp_path / "a.pt", values))
    known = ["model.xformers", "encoder.new_thing", "encoder.text_adapter.other"]
    assert loaded.load_report.unknown == known
    assert [record.message for record in caplog.records] == [str(loaded.load_report)]
    assert f"unknown settings, not followed: {', '.join(known)}" in str(loaded.load_report)
    model["encoder"]["activation_fn"] = "relu"
    path = write(tmp_path / "a.pt", values)
    refused(lambda: from_pretrained(path), f"{path}: encoder: ", "'relu'")


def test_a_file_with_nothing_special_is_loaded_without_a_word(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        loaded = from_pretrained(write(tmp_path / "a.pt", checkpoint_of(retrieval("text"))))
    assert not caplog.records and str(loaded.load_report).endswith("every parameter as the file has it")


def test_a_large_file_shows_how_far_it_is(tmp_path, monkeypatch):
    counts, path = [], write(tmp_path / "a.pt", checkpoint_of(retrieval("text")))
    bar = SimpleNamespace(update=lambda: counts.append(1), close=lambda: counts.append("closed"))
    monkeypatch.setattr(weights, "progress", lambda *arguments: counts.append(arguments) or bar)
    from_pretrained(path)
    assert counts == []
    monkeypatch.setattr(weights, "_SAID_FROM", 0)
    number = len(parameters(from_pretrained(path)))
    assert counts == [("read a.pt", "parameter", number), *[1] * number, "closed"]


def test_settings_in_a_namespace_are_read(tmp_path):
    model = retrieval("text")
    cfg = settings_of(model.config)
    values = checkpoint_of(model, cfg=None, args=Namespace(**{**cfg, "model": Namespace(**cfg["model"])}))
    assert holds(from_pretrained(write(tmp_path / "a.pt", values)), values["model"])


@pytest.mark.parametrize("writer", [write, lambda path, values: write(path, values, zipped=False)])
def test_settings_in_classes_that_are_not_installed_are_read(tmp_path, monkeypatch, writer):
    def record(module, name):
        kind = type(name, (), {"__module__": module})
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{name: kind}))
        return kind

    def held(value):
        one = (dicts if isinstance(value, dict) else lists if isinstance(value, list) else leaves)()
        inside = {"_metadata": metadata()}
        if isinstance(value, dict):
            inside["_content"] = {key: held(item) for key, item in value.items()}
        elif isinstance(value, list):
            inside["_content"] = [held(item) for item in value]
        else:
            inside["_val"] = value
        one.__dict__.update(inside)
        return one

    with monkeypatch.context() as monkeypatch:
        monkeypatch.setitem(sys.modules, "omegaconf", SimpleNamespace())
        dicts = record("omegaconf.dictconfig", "DictConfig")
        lists = record("omegaconf.listconfig", "ListConfig")
        leaves, metadata = record("omegaconf.nodes", "AnyNode"), record("omegaconf.base", "Metadata")
        model = retrieval("text", "image")
        values = checkpoint_of(model)
        path = writer(tmp_path / "a.pt", {**values, "cfg": held(values["cfg"])})
    assert "omegaconf.nodes" not in sys.modules
    loaded = from_pretrained(path)
    assert holds(loaded, values["model"]) and loaded.config.encoder.image == model.config.encoder.image


def test_a_folder_of_any_kind_is_loaded_and_one_with_a_single_checkpoint(tmp_path):
    for number, model in enumerate((retrieval("text", "audio"), classify("image"), vision())):
        model.save(tmp_path / str(number))
        loaded = from_pretrained(str(tmp_path / str(number)), dtype="fp32")
        assert type(loaded) is type(model) and loaded.config == model.config
        assert holds(loaded, {name: value.float() for name, value in parameters(model).items()})
    (tmp_path / "hub").mkdir()
    write(tmp_path / "hub" / "one-peace.pt", checkpoint_of(retrieval("text")))
    assert type(from_pretrained(tmp_path / "hub")) is OnePeaceRetrieval


def test_an_added_modality_is_loaded_with_its_adapter(tmp_path):
    model = small_model("reference")
    model.add_modality("sensor", SensorAdapter().to(torch.float64))
    model.save(tmp_path)
    loaded = from_pretrained(tmp_path, adapters={"sensor": SensorAdapter()})
    assert holds(loaded, parameters(model))


def test_it_is_exported():
    assert {"from_pretrained", "LoadReport", "OnePeaceRetrieval", "OnePeaceClassify"} <= set(onepeace_fast.__all__)
    assert pickle.loads(pickle.dumps(onepeace_fast.LoadReport("a"))) == onepeace_fast.LoadReport("a")
