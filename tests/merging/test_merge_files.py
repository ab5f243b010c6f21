"""Averages of files, and the checkpoints that the command writes of them."""

import dataclasses
import io
import json

import pytest
import torch
from data._refused import taken
from models._mico import CONFIG as MICO
from models._small import randomise, small_model
from models._unival import refusal, unival_config
from pretrained._files import checkpoint_of, settings_of, state_of, write
from safetensors.torch import load_file, save_file

from onepeace_fast import OnePeacePretrain, from_pretrained, merge
from onepeace_fast.cli import main

HALF = (0.25, 0.75)


def two_models():
    models = [small_model("reference", dtype=torch.float32) for _ in range(2)]
    randomise(models[1], 1)
    return models


def expected(models):
    one, two = (model.to_upstream_state_dict() for model in models)
    return {name: (0.25 * one[name].double() + 0.75 * two[name].double()).float() for name in one}


def assert_holds(model, values):
    found = model.to_upstream_state_dict()
    assert found.keys() == values.keys()
    for name, value in values.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


def test_files_of_upstream_become_one_that_from_pretrained_reads(tmp_path, capsys):
    models = two_models()
    paths = [write(tmp_path / f"{name}.pt", checkpoint_of(model)) for name, model in zip("ab", models, strict=True)]
    out = tmp_path / "out.pt"
    assert main(["merge", "--out", str(out), f"{paths[0]}=0.25", f"{paths[1]}=0.75"]) == 0
    assert capsys.readouterr().out == f"{out}: the average of 2 models\n"
    with taken():
        loaded = from_pretrained(out)
    assert_holds(loaded, expected(models))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "b.pt", "out.pt"]
    kept = torch.load(out, weights_only=True)
    assert torch.equal(kept["model"]["encoder_wrapper.fusion_model.version"], torch.tensor([3.0]))


def test_folders_become_a_folder_with_their_configuration_and_tokenizer(tmp_path):
    models = two_models()
    for name, model in zip("ab", models, strict=True):
        model.save(tmp_path / name)
    (tmp_path / "b" / "tokenizer.json").write_text("words")
    (tmp_path / "b" / "SHA256SUMS").write_text("of b")
    weights = {tmp_path / name: weight for name, weight in zip("ab", HALF, strict=True)}
    values = merge(weights)
    assert_holds(models[0], {name: value for name, value in models[0].to_upstream_state_dict().items()})
    assert (
        main(["merge", "--out", str(tmp_path / "out"), *(f"{path}={weight}" for path, weight in weights.items())]) == 0
    )
    merged = OnePeacePretrain.load(tmp_path / "out")
    assert merged.config == models[0].config
    assert_holds(merged, expected(models))
    assert_holds(merged, values)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip


def test_safetensors_and_plain_state_dicts_stay_what_they_are(tmp_path):
    one, two = {"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([5.0, 6.0])}
    for name, state in (("a", one), ("b", two)):
        save_file(state, tmp_path / f"{name}.safetensors")
        torch.save(state, tmp_path / f"{name}.pt")
    for end, load in ((".safetensors", load_file), (".pt", torch.load)):
        out = tmp_path / f"a{end}"  # one of the models: it is read before it is replaced
        assert main(["merge", "--out", str(out), f"{out}=0.25", f"{tmp_path / 'b'}{end}=0.75"]) == 0
        assert {name: value.tolist() for name, value in load(out).items()} == {"a": [4.0, 5.0]}


def test_models_of_other_sizes_are_refused_where_shapes_do_not_show_it(tmp_path):
    model = small_model("reference", dtype=torch.float32)
    for name in "ab":
        model.save(tmp_path / name)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    config["encoder"]["drop_path_rate"] = 0.3  # of a training, not of the model
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    a, b = tmp_path / "a", tmp_path / "b"
    assert merge({a: 0.5, b: 0.5}).keys() == model.to_upstream_state_dict().keys()
    config["encoder"]["attention_heads"] = 1
    (b / "config.json").write_text(json.dumps(config))
    line = f"encoder.attention_heads: expected the same in all models, got 3 in {a} and 1 in {b}"
    assert refusal(lambda: merge({a: 0.5, b: 0.5})) == line

    settings = settings_of(model.config)
    paths = [write(tmp_path / "a.pt", {"cfg": settings, "model": state_of(model)})]
    settings["model"]["encoder"] |= {"attention_heads": 1, "drop_path_rate": 0.7}
    settings["common"]["seed"] = 2
    paths.append(write(tmp_path / "b.pt", {"cfg": settings, "model": state_of(model)}))
    line = f"encoder.attention_heads: expected the same in all models, got 3 in {paths[0]} and 1 in {paths[1]}"
    assert refusal(lambda: merge({path: 0.5 for path in paths})) == line


def test_a_configuration_is_read_as_utf_8_whatever_the_locale_s_encoding_is(tmp_path, monkeypatch):
    small_model("reference", dtype=torch.float32).save(tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    settings = json.loads(path.read_text()) | {"größe": "ä"}
    path.write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")
    monkeypatch.setattr(io, "text_encoding", lambda encoding, *_: encoding or "ascii")
    assert merge({path.parent: 1}).keys() == load_file(path.with_name("model.safetensors")).keys()


def test_a_configuration_that_is_none_is_refused_by_its_name(tmp_path):
    model = small_model("reference", dtype=torch.float32)
    model.save(tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    path.write_text("[1]")
    line = ""
    try:
        merge({path.parent: 1})
    except Exception as error:
        line = str(error)
    assert line == f"{path}: expected a configuration that save() wrote, got list [1]"


def test_what_a_training_chose_may_differ(tmp_path):
    noises = ("dropout", "attention_dropout", "activation_dropout", "encoder_drop_path_rate", "decoder_drop_path_rate")
    weights = {f"{name}_weight": 2.0 for name in ("contrast", "matching", "caption")}
    for config, changed in ((unival_config(), dict.fromkeys(noises, 0.5)), (MICO, weights)):
        state = {"a": torch.ones(1)}
        for name, changes in (("a", {}), ("b", changed)):
            folder = tmp_path / config.kind / name
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(json.dumps({**dataclasses.asdict(config), **changes}))
            save_file(state, folder / "model.safetensors")
        paths = [tmp_path / config.kind / name for name in "ab"]
        assert refusal(lambda: merge({path: 0.5 for path in paths})) == ""  # noqa: B023
    for name, rate in (("a", 0.0), ("b", 0.1)):
        args = dict.fromkeys(noises, rate) | {"encoder_layers": 2}
        torch.save({"args": args, "model": {"a": torch.ones(1)}}, tmp_path / f"{name}.pt")
    assert refusal(lambda: merge({tmp_path / "a.pt": 0.5, tmp_path / "b.pt": 0.5})) == ""


def test_two_vocabularies_are_refused(tmp_path):
    model = small_model("reference")
    for name in "ab":
        model.save(tmp_path / name)
        (tmp_path / name / "tokenizer.json").write_text(name)
    a, b = tmp_path / "a", tmp_path / "b"
    line = f"tokenizer.json: expected one vocabulary, got two, in {a} and {b}"
    assert refusal(lambda: merge({a: 0.5, b: 0.5})) == line


@pytest.mark.parametrize(
    ("out", "models", "line"),
    [
        ("out.safetensors", ["a.pt=1"], "{out}: expected a file by torch.save, as the models are, got another name"),
        ("no/out.pt", ["a.pt=1"], "{out}: expected a name in a folder that exists, got none"),
        ("out.pt", ["a.pt=0.5", "a.pt=0.4"], "weights: expected a sum of 1, got 0.9; divide each of them by it"),
        (
            "out.pt", ["a.pt=0.5", "a.safetensors=0.5"],
            "models: expected files of one form, got a .safetensors file and a file by torch.save",
        ),
        ("out.pt", ["b.pt=1"], "{folder}/b.pt: expected tensors, got none"),
        ("out.pt", ["c.pt=1"], "{folder}/c.pt: expected a checkpoint by torch.save or pickle, got "
         "a file of another format"),
        ("out", ["d=1"], "{folder}/d: expected a folder that save() wrote, got one without config.json"),
    ],
)  # fmt: skip
def test_the_command_refuses_in_one_line_and_writes_nothing(tmp_path, capsys, out, models, line):
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    torch.save({"model": {}}, tmp_path / "b.pt")
    (tmp_path / "c.pt").write_text("text")
    (tmp_path / "d").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert main(["merge", "--out", str(tmp_path / out), *(f"{tmp_path}/{model}" for model in models)]) == 2
    assert capsys.readouterr().err == line.format(out=tmp_path / out, folder=tmp_path) + "\n"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("text", ["a.pt", "=1", "a.pt=half"])
def test_the_command_says_how_a_model_is_given(capsys, text):
    with pytest.raises(SystemExit):
        main(["merge", "--out", "out.pt", text])
    assert f"expected CHECKPOINT=WEIGHT, such as a.pt=0.5, got {text!r}" in capsys.readouterr().err
