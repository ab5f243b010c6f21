"""The page on training and the examples say what the code does."""

import dataclasses
import re
from pathlib import Path

import pytest

pytest.importorskip("yaml")

from onepeace_fast import OnePeaceConfig
from onepeace_fast.training.config import TrainingConfig

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_lists_every_key_with_its_default():
    page = (ROOT / "docs" / "training.md").read_text()
    listed = dict(re.findall(r"^\| `(\w+)` \| (?:`([^`]*)`)? ?\|", page, re.MULTILINE))
    keys = {}
    for item in dataclasses.fields(TrainingConfig):
        if item.metadata:
            default = {dataclasses.MISSING: "", None: "null"}.get(item.default, str(item.default))
            keys[item.name] = default
    assert {name: listed.get(name) for name in keys} == keys


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
