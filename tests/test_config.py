"""Configurations: upstream's model sections, their defaults, and what is refused."""

import dataclasses
import io
import json

import pytest
from data._refused import refused, taken
from models._goldens import golden

from onepeace_fast import OnePeaceConfig
from onepeace_fast.config import AudioAdapterConfig, ImageAdapterConfig, TextAdapterConfig, TransformerConfig

BIASED = {"use_attn_bias": True}
ENCODER = {"text_adapter": BIASED, "image_adapter": BIASED, "audio_adapter": BIASED}
DECODER = {"image_adapter": {"vision_encoder_type": "none"}, "audio_adapter": {"abs_pos_type": "fixed"}}


def from_upstream(encoder=None, decoder=None, vocab_size=100):
    return OnePeaceConfig.from_upstream({**ENCODER, **(encoder or {})}, {**DECODER, **(decoder or {})}, vocab_size)


def test_recorded_sections_are_read_into_every_field():
    recording = golden("perlayer")
    audio = AudioAdapterConfig(
        feature_layers=((16, 10, 5), (16, 3, 2)),
        position_layers=5,
        position_width=95,
        position_groups=8,
        bucket_size=16,
    )
    encoder = TransformerConfig(
        embed_dim=64, ffn_embed_dim=96, layers=3, attention_heads=2, drop_path_rate=0.0, dropout=0.0,
        sub_layer_norm=True, attention_layer_norm=False,
        ffn_layer_norm=True, head_scale=False, layer_scale=0.01, bias_table_per_layer=True,
        checkpoint_activations=False, text=TextAdapterConfig(bucket_size=12),
        image=ImageAdapterConfig(position_grid=3, bias_grid=4), audio=audio,
    )  # fmt: skip
    assert recording.config.encoder == encoder
    assert recording.config.vocab_size == 40
    decoder = recording.config.decoder
    assert (decoder.embed_dim, decoder.ffn_embed_dim, decoder.layers, decoder.attention_heads) == (32, 48, 1, 1)
    assert decoder.layer_scale is None
    assert not decoder.use_bias


def test_recorded_flags_are_read():
    encoder = golden("flags").config.encoder
    assert encoder.head_scale
    assert encoder.attention_layer_norm
    assert not encoder.sub_layer_norm
    assert encoder.layer_scale is None
    assert encoder.image == ImageAdapterConfig(position_grid=3, bias_grid=3)


def test_absent_keys_take_upstreams_defaults():
    encoder = from_upstream().encoder
    assert encoder == TransformerConfig(
        embed_dim=512, ffn_embed_dim=2048, layers=6, attention_heads=8, drop_path_rate=0.0, dropout=0.1,
        sub_layer_norm=False, attention_layer_norm=True, ffn_layer_norm=True, head_scale=True, layer_scale=1e-2,
        bias_table_per_layer=False, checkpoint_activations=False, text=TextAdapterConfig(bucket_size=256),
        image=ImageAdapterConfig(position_grid=16, bias_grid=16), audio=AudioAdapterConfig(bucket_size=256),
    )  # fmt: skip


def test_the_defaults_are_the_public_models():
    config = OnePeaceConfig()
    encoder, decoder = config.encoder, config.decoder
    sizes = (encoder.embed_dim, encoder.ffn_embed_dim, encoder.layers, encoder.attention_heads)
    assert sizes == (1536, 6144, 40, 24)
    assert (decoder.embed_dim, decoder.ffn_embed_dim, decoder.layers, decoder.attention_heads) == (768, 2048, 2, 12)
    assert (encoder.text.bucket_size, encoder.audio.bucket_size, encoder.image.bias_grid) == (256, 512, 16)
    assert encoder.audio.feature_layers == ((512, 10, 5), *[(512, 3, 2)] * 4, *[(512, 2, 2)] * 2)
    assert decoder.bias_tables == 0
    assert encoder.bias_tables == 1


def test_a_modality_without_its_experts_is_not_in_the_model():
    config = from_upstream({"use_audio_moe": False}, {"use_audio_moe": False})
    assert config.encoder.audio is None
    assert config.encoder.modalities == ("text", "image")


def test_layer_scale_is_off_without_its_switch():
    assert from_upstream({"use_layer_scale": False, "layer_scale_init_value": 1.0}).encoder.layer_scale is None
    assert from_upstream({"layer_scale_init_value": 1e-6}).encoder.layer_scale == 1e-6


def test_one_table_per_layer_and_modality():
    assert from_upstream({"copy_rel_pos_table": True, "layers": 9}).encoder.bias_tables == 9


UNSUPPORTED = {
    "attention_dropout": {"attention_dropout": 0.1},
    "activation_dropout": {"activation_dropout": 0.1},
    "layerdrop": {"layerdrop": 0.2},
    "activation_fn": {"activation_fn": "relu"},
    "layernorm_embedding": {"text_adapter": {**BIASED, "layernorm_embedding": True}},
    "add_type_embedding": {"audio_adapter": {**BIASED, "add_type_embedding": True}},
    "shrink_alpha": {"audio_adapter": {**BIASED, "shrink_alpha": 0.1}},
    "dropout": {"text_adapter": {**BIASED, "dropout": 0.1}},
    "conv_pos_pre_ln": {"audio_adapter": {**BIASED, "conv_pos_pre_ln": True}},
    "conv_bias": {"audio_adapter": {**BIASED, "conv_bias": True}},
    "vision_encoder_type": {"image_adapter": {**BIASED, "vision_encoder_type": "mlp"}},
    "abs_pos_type": {"audio_adapter": {**BIASED, "abs_pos_type": "fixed"}},
}


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_a_value_that_is_not_implemented_is_refused_by_name(key):
    refused(lambda: from_upstream(UNSUPPORTED[key]), "", key)


def test_all_unsupported_values_of_a_section_are_named_at_once():
    with pytest.raises(ValueError, match=r"attention_dropout.*layerdrop"):
        from_upstream({"attention_dropout": 0.1, "layerdrop": 0.2})


@pytest.mark.parametrize(
    ("section", "encoder", "decoder"),
    [
        ("encoder", {"embed_dims": 3}, {}),
        ("decoder", {}, {"embed_dims": 3}),
        ("encoder.text_adapter", {"text_adapter": {**BIASED, "embed_dims": 3}}, {}),
        ("decoder.audio_adapter", {}, {"audio_adapter": {"abs_pos_type": "fixed", "embed_dims": 3}}),
    ],
)
def test_an_unknown_key_is_refused_with_its_section(section, encoder, decoder):
    message = f"{section}: expected keys of upstream's model section, got unknown ones ['embed_dims']"
    refused(lambda: from_upstream(encoder, decoder), "", message)


@pytest.mark.parametrize(
    ("spec", "layers"),
    [
        ("[(512, 10, 5)]", ((512, 10, 5),)),
        ("[(16, 10, 5)] + [(16, 3, 2)] * 2", ((16, 10, 5), (16, 3, 2), (16, 3, 2))),
        ("[(1, 2, 3), (4, 5, 6)] * 2 + [(7,8,9)]", ((1, 2, 3), (4, 5, 6), (1, 2, 3), (4, 5, 6), (7, 8, 9))),
    ],
)
def test_extractor_layers_are_read(spec, layers):
    audio = {"audio_adapter": {**BIASED, "feature_encoder_spec": spec}}
    assert from_upstream(audio).encoder.audio.feature_layers == layers


@pytest.mark.parametrize(
    "spec",
    [
        "__import__('pathlib').Path('{marker}').touch()",
        "[(512, 10, 5)] + [open('{marker}', 'w')]",
        "[(512, 10, 5) for _ in [open('{marker}', 'w')]]",
        "[(512, 10, 5)] * len(open('{marker}', 'w').name)",
        "(lambda: open('{marker}', 'w'))()",
        "[(512, 10, 5)] - [(1, 1, 1)]",
        "[(512, 10)]",
        "[(512, 0, 5)]",
        "[(512, 10, -5)]",
        "[(512, 10, 5)] * 0",
        "512",
        "[",
        "",
        "(" * 500,
        "[(512, 10, 5)] * 99999999999",
        None,
    ],
)
def test_an_extractor_of_anything_else_is_refused_and_never_run(spec, tmp_path):
    marker = tmp_path / "ran"
    audio = {"audio_adapter": {**BIASED, "feature_encoder_spec": spec and spec.replace("{marker}", str(marker))}}
    refused(lambda: from_upstream(audio), "feature_encoder_spec: ")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["tiny", "flags", "perlayer"])
def test_a_saved_configuration_is_loaded_unchanged(name, tmp_path):
    path = tmp_path / "config.json"
    config = golden(name).config
    config.save(path)
    assert OnePeaceConfig.load(path) == config
    assert OnePeaceConfig.load(str(path)) == config


def test_a_configuration_without_a_modality_is_loaded_unchanged(tmp_path):
    config = from_upstream({"use_audio_moe": False}, {"use_audio_moe": False})
    config.save(tmp_path / "config.json")
    assert OnePeaceConfig.load(tmp_path / "config.json") == config


def test_a_file_is_read_as_utf_8_whatever_the_locale_s_encoding_is(tmp_path, monkeypatch):
    monkeypatch.setattr(io, "text_encoding", lambda encoding, *_: encoding or "ascii")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"größe": 1}, ensure_ascii=False), encoding="utf-8")
    refused(lambda: OnePeaceConfig.load(path), "", "größe")


def test_an_unknown_field_of_a_file_is_refused(tmp_path):
    path = tmp_path / "config.json"
    values = dataclasses.asdict(OnePeaceConfig())
    values["encoder"]["text"]["buckets"] = 3
    path.write_text(json.dumps(values))
    refused(lambda: OnePeaceConfig.load(path), "", "'use_bias'], got unknown fields ['buckets']")


NONSENSE = {
    "embed_dim": {"embed_dim": 65, "attention_heads": 2},
    "attention_heads": {"attention_heads": 0},
    "layers": {"layers": 0},
    "ffn_embed_dim": {"ffn_embed_dim": 0},
    "drop_path_rate": {"drop_path_rate": 1.0},
    "dropout": {"dropout": -0.1},
    "text, image, audio": {"text": None, "image": None, "audio": None},
    "use_bias": {"text": TextAdapterConfig(use_bias=False)},
}


@pytest.mark.parametrize("name", NONSENSE)
def test_a_stack_of_nonsense_is_refused_by_name(name):
    refused(lambda: TransformerConfig(**NONSENSE[name]), "", name)


@pytest.mark.parametrize("name", ["layers", "embed_dim", "attention_heads", "ffn_embed_dim"])
@pytest.mark.parametrize("value", [-1, 1.5, "2", None])
def test_a_size_that_is_no_positive_integer_is_refused_by_name(name, value):
    refused(lambda: TransformerConfig(**{name: value}), "", name)


def test_a_layer_scale_that_pyyaml_reads_as_text_is_taken():
    """PyYAML reads 1e-6, as upstream's files have it, as text: it wants 1.0e-6."""
    assert from_upstream({"layer_scale_init_value": "1e-6"}).encoder.layer_scale == 1e-6


@pytest.mark.parametrize("value", ["small", float("nan")])
def test_a_layer_scale_that_is_no_number_is_refused(value):
    refused(lambda: TransformerConfig(layer_scale=value), "", "layer_scale")
    refused(lambda: from_upstream({"layer_scale_init_value": value}), "", "layer_scale")


@pytest.mark.parametrize(
    ("adapter", "name", "value"),
    [
        (TextAdapterConfig, "bucket_size", 0),
        (AudioAdapterConfig, "bucket_size", -4),
        (AudioAdapterConfig, "position_layers", 0),
        (AudioAdapterConfig, "position_groups", 0),
        (AudioAdapterConfig, "feature_layers", ()),
        (AudioAdapterConfig, "feature_layers", ((512, 0, 5),)),
        (ImageAdapterConfig, "position_grid", 0),
        (ImageAdapterConfig, "bias_grid", -1),
    ],
)
def test_an_adapter_of_nonsense_is_refused_by_name(adapter, name, value):
    refused(lambda: adapter(**{name: value}), "", name)


def test_an_encoder_without_bias_is_refused():
    unbiased = {"text": TextAdapterConfig(use_bias=False), "image": None, "audio": None}
    encoder = TransformerConfig(**unbiased)
    refused(lambda: OnePeaceConfig(encoder=encoder), "encoder: expected use_bias True, got False")


def test_a_decoder_with_a_modality_that_the_encoder_lacks_is_refused():
    message = "decoder: expected modalities that the encoder has too, got ['audio']"
    refused(lambda: OnePeaceConfig(encoder=TransformerConfig(audio=None)), message)


def test_a_vocabulary_without_the_specials_is_refused():
    refused(lambda: OnePeaceConfig(vocab_size=3), "", "vocab_size: expected at least the 4 specials, got 3")


READ = {
    "embed_dim": 48, "ffn_embed_dim": 72, "layers": 3, "attention_heads": 4, "drop_path_rate": 0.4, "dropout": 0.2,
    "magneto_scale_attn": True, "scale_attn": False, "scale_fc": False, "scale_heads": False,
    "layer_scale_init_value": 0.5, "copy_rel_pos_table": True, "checkpoint_activations": True,
}  # fmt: skip
FIELDS = {
    "magneto_scale_attn": "sub_layer_norm", "scale_attn": "attention_layer_norm", "scale_fc": "ffn_layer_norm",
    "scale_heads": "head_scale", "layer_scale_init_value": "layer_scale", "copy_rel_pos_table": "bias_table_per_layer",
}  # fmt: skip


@pytest.mark.parametrize("key", READ)
def test_each_key_of_upstreams_changes_its_own_field_and_no_other(key):
    plain, changed = (dataclasses.asdict(from_upstream(values).encoder) for values in ({}, {key: READ[key]}))
    differing = {name: value for name, value in changed.items() if value != plain[name]}
    assert differing == {FIELDS.get(key, key): READ[key]}


def test_keys_with_the_one_value_that_is_implemented_are_taken():
    common = {"layernorm_embedding": False, "add_type_embedding": False, "shrink_alpha": 1.0, "dropout": 0.0}
    given = {
        "attention_dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0, "activation_fn": "gelu",
        "text_adapter": {**BIASED, **common}, "image_adapter": {**BIASED, **common},
        "audio_adapter": {**BIASED, **common, "conv_pos_pre_ln": False, "conv_bias": False},
    }  # fmt: skip
    with taken():
        assert from_upstream(given) == from_upstream()
