"""The YAML of a run: what it takes, and one line for everything else."""

import json

import pytest
from data._refused import refused, taken

pytest.importorskip("yaml")

from onepeace_fast import OnePeaceConfig
from onepeace_fast.training.config import TrainingConfig

SMALLEST = """\
stage: vision_language
manifest: pairs.tsv
output: run
steps: 20
batch_size: 4
learning_rate: 1e-3
"""


def load(folder, text):
    path = folder / "run.yaml"
    path.write_text(text)
    return TrainingConfig.load(path)


def refusal(folder, text):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        load(folder, text)
    return str(caught.value)


def test_a_short_file_takes_the_papers_defaults_and_paths_beside_itself(tmp_path):
    config = load(tmp_path, SMALLEST)
    assert (config.weight_decay, config.clip, config.precision, config.accumulation) == (0.05, 3.0, "float32", 1)
    assert config.path("manifest") == tmp_path / "pairs.tsv"
    assert config.path("tokenizer") is None
    assert config.modality == "image"


def test_numbers_with_an_exponent_are_numbers(tmp_path):
    assert load(tmp_path, SMALLEST).learning_rate == 1e-3
    assert load(tmp_path, SMALLEST.replace("1e-3", "2E+1")).learning_rate == 20.0


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("stepz: 3", ["got 'stepz'; did you mean steps?"]),
        ("3: 3", ["expected some of manifest, output, batch_size", "got 3"]),
        ("accumulation: 0", ["accumulation: expected a positive integer, got int 0"]),
        ("accumulation: true", ["accumulation: expected a positive integer, got bool True"]),
        ("accumulation: 1.5", ["accumulation: expected a positive integer, got float 1.5"]),
        ("weight_decay: -0.1", ["weight_decay: expected a number from 0 on, got float -0.1"]),
        ("clip: .inf", ["clip: expected a positive number, got float inf"]),
        ("clip: much", ["clip: expected a positive number, got str 'much'"]),
        ("precision: float16", ["precision: expected one of float32, bfloat16, got str 'float16'"]),
        ("precision: [float32]", ["precision: expected one of float32, bfloat16, got list"]),
        ("missing: ignore", ["missing: expected one of fatal, list, skip, got str 'ignore'"]),
        ("broken: list", ["broken: expected one of fatal, skip, got str 'list'"]),
        ("backend: fast", ["backend: expected one of reference, fused, got str 'fast'"]),
        ("device: tpu", ["device: expected one of cpu, cuda, got str 'tpu'"]),
        ("seed: -1", ["seed: expected an integer from 0 to below 2**64, got int -1"]),
        ("tokenizer: 3", ["tokenizer: expected a path, got int 3"]),
        ("model: 3", ["model: expected fields of a model configuration, or a config.json, got int 3"]),
        ("warm_up: 20", ["warm_up: expected fewer than steps (20), got 20"]),
        ("minimum_learning_rate: 0.1", ["minimum_learning_rate: expected at most learning_rate (0.001), got 0.1"]),
        ("keep: 0", ["keep: expected a positive integer, got int 0"]),
        ("steps: 30", ["line 7", "steps stands twice"]),
        ("clip: [", ["not valid YAML"]),
        ("clip: " + "[" * 5000, ["not valid YAML: sections within sections"]),
        ("clip:\n\t- 3", ["line 8", "not valid YAML"]),
    ],
)
def test_a_wrong_line_is_refused_by_its_key(tmp_path, line, parts):
    message = refusal(tmp_path, SMALLEST + line + "\n")
    assert message.startswith(str(tmp_path / "run.yaml")) and all(part in message for part in parts), message


def test_missing_keys_are_named_together(tmp_path):
    message = refusal(tmp_path, "stage: vision_language\noutput: run\nsteps: 3\n")
    assert "expected manifest, batch_size, learning_rate, got no value" in message


@pytest.mark.parametrize("text", ["", "3\n", "- stage\n"])
def test_a_file_without_keys_is_refused(tmp_path, text):
    assert "expected a mapping of keys to values, got " in refusal(tmp_path, text)


def test_an_unknown_stage_is_refused_and_the_second_needs_a_model(tmp_path):
    assert "expected one of vision_language, audio_language, " in refusal(tmp_path, SMALLEST.replace("vision", "video"))
    assert "init: expected the model folder" in refusal(tmp_path, SMALLEST.replace("vision", "audio"))
    second = load(tmp_path, SMALLEST.replace("vision", "audio") + "init: first/step-00000020\n")
    assert second.path("init") == tmp_path / "first/step-00000020"


def test_weights_that_come_from_a_model_are_not_scaled(tmp_path):
    assert load(tmp_path, SMALLEST + "initial_scale: 3\n").initial_scale == 3
    said = refusal(tmp_path, SMALLEST + "init: model\ninitial_scale: 3\n")
    assert "initial_scale: expected none beside init, whose weights stay as they are, got 3" in said


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    for path, reason in ((tmp_path / "none.yaml", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ValueError, match=f"cannot be read: {reason}"):
            TrainingConfig.load(path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot be read: not a text file"):
        TrainingConfig.load(tmp_path / "binary.yaml")


def test_model_fields_replace_those_of_the_base_one_by_one(tmp_path):
    text = SMALLEST + "model:\n  vocab_size: 99\n  encoder: {layers: 3, layer_scale: 1e-2, audio: null}\n"
    text += "  decoder: {audio: null, dropout: 0.1}\n"
    config = load(tmp_path, text).model_config(OnePeaceConfig())
    assert (config.vocab_size, config.encoder.layers, config.encoder.layer_scale) == (99, 3, 0.01)
    assert (config.encoder.embed_dim, config.decoder.embed_dim, config.decoder.dropout) == (1536, 768, 0.1)
    assert config.encoder.modalities == config.decoder.modalities == ("text", "image")
    text = SMALLEST + "model: {encoder: {audio: {bucket_size: 8}}, decoder: {audio: {use_bias: false}}}"
    added = load(tmp_path, text).model_config(config)
    assert added.encoder.audio.bucket_size == 8
    assert added.encoder.audio.position_layers == 5


def test_a_model_may_be_a_config_file(tmp_path):
    saved = OnePeaceConfig(vocab_size=77)
    saved.save(tmp_path / "sizes.json")
    assert load(tmp_path, SMALLEST + "model: sizes.json\n").model_config(OnePeaceConfig()) == saved
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken.json, line 1: not valid JSON"):
        load(tmp_path, SMALLEST + "model: broken.json\n").model_config(OnePeaceConfig())
    with pytest.raises(ValueError, match=r"none.json: cannot be read"):
        load(tmp_path, SMALLEST + "model: none.json\n").model_config(OnePeaceConfig())


@pytest.mark.parametrize(
    ("model", "part"),
    [
        ({"layers": 3}, "unknown fields ['layers']"),
        ({"encoder": {"layer": 3}}, "unknown fields ['layer']"),
        ({"encoder": {"layers": "three"}}, "layers: expected a positive integer, got 'three'"),
        ({"encoder": 3}, "encoder: expected a section of fields, got int 3"),
        ({"encoder": {"text": 3}}, "encoder.text: expected a section of fields, got int 3"),
        ({"encoder": {"sub_layer_norm": 1}}, "encoder.sub_layer_norm: expected true or false, got int 1"),
        ({"encoder": {"drop_path_rate": 1.0}}, "drop_path_rate: expected a probability in [0, 1), got 1.0"),
        ({"encoder": {"audio": {"feature_layers": 3}}}, ""),
    ],
)
def test_model_fields_that_do_not_fit_are_refused(tmp_path, model, part):
    config = load(tmp_path, SMALLEST + f"model: {json.dumps(model)}\n")
    refused(lambda: config.model_config(OnePeaceConfig()), "model: ", part)


def test_settings_hold_what_changes_the_result_and_nothing_else(tmp_path):
    first = load(tmp_path, SMALLEST).settings()
    same = load(tmp_path, SMALLEST + "keep: 9\nlog_every: 1\ncheckpoint_every: 3\nworkers: 0\n").settings()
    assert same == first
    other = load(tmp_path, SMALLEST + "accumulation: 2\n").settings()
    assert {name for name in first if other[name] != first[name]} == {"accumulation"}


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = SMALLEST.replace("pairs.tsv", "~/data/images.tsv").replace("output: run", "output: ~/runs/one")
    config = load(tmp_path, keys + "tokenizer: here.json\n")
    assert TrainingConfig.load("~/run.yaml") == config
    assert config.path("manifest") == tmp_path / "data" / "images.tsv"
    assert config.path("output") == tmp_path / "runs" / "one"
    assert config.path("tokenizer") == tmp_path / "here.json"


@pytest.mark.parametrize("name", ["a\ud800.yaml", "a\0.yaml"])
def test_a_name_that_no_file_can_have_is_refused_in_one_line(name):
    with pytest.raises(ValueError, match=r": cannot be read: ") as caught:
        TrainingConfig.load(name)
    assert "\n" not in str(caught.value)


def test_a_folder_whose_name_is_not_utf_8_is_refused_before_anything_is_computed(tmp_path):
    folder = tmp_path / "caf\udce9"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"run\.yaml: output: expected a path in UTF-8, got '.*caf\\udce9/run'"):
        load(folder, SMALLEST)
    load(folder, SMALLEST.replace("output: run", f"output: {tmp_path}/run"))


@pytest.mark.parametrize("keys", ["minimum_learning_rate: 0.001\nlearning_rate: 0.001\n", "warm_up: 9\nsteps: 10\n"])
def test_a_constant_rate_and_a_warm_up_to_the_last_step_are_taken(tmp_path, keys):
    names = [line.split(":")[0] for line in keys.splitlines()]
    rest = {"stage": "vision_language", "manifest": "a.tsv", "output": "out", "batch_size": 1, "steps": 10}
    rest |= {"learning_rate": 0.001}
    path = tmp_path / "run.yaml"
    path.write_text(keys + "".join(f"{name}: {value}\n" for name, value in rest.items() if name not in names))
    with taken():
        config = TrainingConfig.load(path)
    assert config.learning_rate == 0.001 and config.steps == 10
