"""The public 4 B model: built without memory, counted parameter by parameter."""

import pytest
import torch

from onepeace_fast import OnePeaceConfig, OnePeacePretrain


@pytest.fixture(scope="module")
def encoder():
    with torch.device("meta"):
        return OnePeacePretrain(OnePeaceConfig()).encoder_wrapper


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_vocabulary_has_50264_entries(encoder):
    assert OnePeaceConfig().vocab_size == 50264
    assert list(encoder.text_adapter.embed_tokens.weight.shape) == [50264, 1536]


@pytest.mark.parametrize(
    ("modality", "parameters"), [("text", 78_008_880), ("image", 3_390_816), ("audio", 19_040_816)]
)
def test_adapter_has_the_public_number_of_parameters(encoder, modality, parameters):
    assert count(encoder.adapter(modality)) == parameters


def test_each_of_40_layers_has_94430208_parameters(encoder):
    assert [count(layer) for layer in encoder.fusion_model.layers] == [94_430_208] * 40


def test_encoder_has_3877658048_parameters_of_which_final_norms_are_the_rest(encoder):
    assert count(encoder) == 3_877_658_048
    norms = sum(count(encoder.fusion_model.final_norm(name)) for name in ("text", "image", "audio"))
    assert norms == 3_877_658_048 - 78_008_880 - 3_390_816 - 19_040_816 - 40 * 94_430_208 == 3 * 2 * 1536


def test_building_on_meta_allocates_nothing(encoder):
    assert {parameter.device.type for parameter in encoder.parameters()} == {"meta"}
