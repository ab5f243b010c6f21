"""The page on training and the examples say what the code does."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("yaml")

from training._mico_runs import write_samples

from onepeace_fast import OnePeaceConfig
from onepeace_fast.training import command
from onepeace_fast.training.config import TrainingConfig
from onepeace_fast.training.mico_config import MicoTrainingConfig
from onepeace_fast.training.start import read_run
from onepeace_fast.training.unival import Tasks
from onepeace_fast.training.unival_config import UnivalTrainingConfig

ROOT = Path(__file__).resolve().parents[2]


def listed(page):
    """The keys of a page's tables with their defaults."""
    text = (ROOT / "docs" / page).read_text()
    return dict(re.findall(r"^\| `(\w+)` \| (?:`([^`]*)`)? ?\|", text, re.MULTILINE))


def keys_of(kind):
    items = (item for item in dataclasses.fields(kind) if item.metadata)
    return {item.name: {dataclasses.MISSING: "", None: "null"}.get(item.default, str(item.default)) for item in items}


def test_the_page_lists_every_key_with_its_default():
    keys, found = keys_of(TrainingConfig), listed("training.md")
    assert {name: found.get(name) for name in keys} == keys


def test_unival_s_page_lists_its_own_keys_and_defaults():
    shared, keys = keys_of(TrainingConfig), keys_of(UnivalTrainingConfig)
    assert listed("unival.md") == {name: value for name, value in keys.items() if shared.get(name) != value}


def test_unival_s_example_is_a_configuration_and_its_model_fits():
    config = read_run(ROOT / "examples" / "train_unival.yaml")
    model = config.model_config(Tasks.default_model)
    rates = {name: 0.1 for name in ("dropout", "encoder_drop_path_rate", "decoder_drop_path_rate")}
    assert model == dataclasses.replace(Tasks.default_model, **rates) and "audio" in model.modalities
    assert [len(part.tasks) for part in config.parts] == [4, 5]


def test_mico_s_page_has_a_configuration_that_runs(tmp_path, capsys):
    (written,) = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs" / "mico.md").read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "run.yaml").write_text(written)
    config = read_run(tmp_path / "run.yaml")
    write_samples(tmp_path, side=config.model["vision"]["image_size"])
    assert command.pretrain(str(tmp_path / "run.yaml")) == 0
    folder = config.path("output") / f"step-{config.steps:08d}"
    assert f"Done: {folder}" in capsys.readouterr().out
    manifest = config.path("manifest")
    found = code_of("mico.md")["nearest"](folder, manifest, "a red wall")
    assert sorted(found) == sorted(json.loads(line)["caption"] for line in manifest.read_text().splitlines())


def code_of(page):
    """What the code of a page defines."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.MULTILINE | re.DOTALL)
    names = {}
    exec("\n".join(blocks), names)  # a page of this repository
    return names


def test_mico_s_keys_are_those_of_all_runs():
    shared, keys = keys_of(TrainingConfig), keys_of(MicoTrainingConfig)
    assert {name for name, value in keys.items() if shared.get(name) != value} == {"family"}
    assert {*shared} - {*keys} == {"stage", "initial_scale"}


@pytest.mark.parametrize("name", ["vision_language", "audio_language"])
def test_an_example_is_a_configuration_and_its_model_fits(name):
    config = TrainingConfig.load(ROOT / "examples" / f"pretrain_{name}.yaml")
    assert config.stage == name
    first = TrainingConfig.load(ROOT / "examples" / "pretrain_vision_language.yaml")
    base = first.model_config(OnePeaceConfig())
    assert base.encoder.image.position_grid == base.decoder.image.position_grid == 8
    model = config.model_config(base)
    assert config.modality in model.encoder.modalities
    assert config.modality in model.decoder.modalities
    if name == "audio_language":
        assert config.path("init") == first.path("output") / f"step-{first.steps:08d}"
