"""Upstream's checkpoints of MiCo: sizes by their weights, old names, parts that are left out, other image sizes."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from models._mico import CONFIG, refusal
from models._small import randomise

from onepeace_fast import from_pretrained
from onepeace_fast.models.mico import EvaConfig, Mico, MicoConfig, TextConfig

TEXT = TextConfig(vocab_size=110, width=64, ffn_dim=20, layers=1, max_positions=9, heads=1)
EVA_1 = EvaConfig(image_size=28, patch_size=14, width=1408, layers=1, head_width=88, ffn_dim=12, output_dim=6)
EVA_2 = EvaConfig(
    image_size=32, patch_size=16, width=768, layers=2, head_width=64, ffn_dim=10, output_dim=6, rope=True, swiglu=True,
    sub_layer_norm=True,
)  # fmt: skip


def written(path, config, **more):
    """A checkpoint as upstream writes it, flat, and the model that it is of."""
    model = Mico(config)
    randomise(model)
    torch.save({**model.to_upstream_state_dict(), **more}, path)
    return model


@pytest.mark.parametrize("vision", [EVA_1, EVA_2], ids=["EVA-01", "EVA-02"])
def test_sizes_are_those_of_the_weights(vision, tmp_path):
    config = MicoConfig(vision=vision, text=TEXT, contra_dim=5, frames={"vision": 3, "audio": 2, "depth": 4})
    model = written(tmp_path / "model_step_7.pt", config, **{"vision_encoder.text.ln_final.bias": torch.zeros(3)})
    found = from_pretrained(tmp_path, model_type="mico")
    assert found.config == config and type(found) is Mico and not found.training
    assert found.load_report.left_out == ["vision_encoder.text.ln_final.bias"]
    for name, value in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    if vision.rope:
        assert torch.equal(found.vision_encoder.visual.rope_cos, model.vision_encoder.visual.rope_cos)


def test_older_names_and_buffers_are_taken_and_the_dtype_is_the_one_asked_for(tmp_path):
    config = MicoConfig(vision=EVA_2, text=TEXT, contra_dim=5)
    model, state = Mico(config), {}
    for name, value in model.to_upstream_state_dict().items():
        old = name.replace("vision_encoder", "evaclip_model")
        state[old if old != name else name.replace("vision_", "video_")] = value
    angles = model.vision_encoder.visual.carried()
    state |= {f"evaclip_model.visual.{name}": value for name, value in angles.items()}
    torch.save(state, tmp_path / "old.pt")
    found = from_pretrained(tmp_path / "old.pt", model_type="mico", dtype="bf16")
    assert torch.equal(found.vision_frame_embedding, model.vision_frame_embedding.bfloat16())
    torch.save({**state, "evaclip_model.visual.rope.freqs_cos": torch.zeros(4, 64)}, tmp_path / "wrong.pt")
    line = refusal(lambda: from_pretrained(tmp_path / "wrong.pt", model_type="mico"))
    assert "vision_encoder.visual.rope.freqs_cos differs from the one that follows from the others" in line


def test_positions_are_resampled_for_another_image_size(tmp_path):
    config = MicoConfig(vision=EVA_1, text=TEXT, contra_dim=5)
    model = written(tmp_path / "model.pt", config)
    found = from_pretrained(tmp_path / "model.pt", model_type="mico", image_size=56)
    positions = model.vision_encoder.visual.pos_embed.detach()
    grid = positions[0, 1:].view(2, 2, 1408).permute(2, 0, 1)[None]
    expected = F.interpolate(grid, (4, 4), mode="bilinear")[0].permute(1, 2, 0).reshape(16, 1408)
    assert found.config.vision.image_size == 56
    assert torch.equal(found.vision_encoder.visual.pos_embed[0, 0], positions[0, 0])
    torch.testing.assert_close(found.vision_encoder.visual.pos_embed[0, 1:], expected)
    assert found.load_report.resampled == ["vision_encoder.visual.pos_embed from 2 x 2 to 4 x 4 patches"]


def test_what_does_not_fit_is_refused_in_one_line(tmp_path):
    path = tmp_path / "small.pt"
    written(path, CONFIG)
    line = refusal(lambda: from_pretrained(path, model_type="mico"))
    assert line.startswith(f"{path}: config: expected one for an encoder of width 16, whose heads are not those of ")
    assert from_pretrained(path, model_type="mico", config=CONFIG).config is CONFIG
    line = refusal(lambda: from_pretrained(path))
    assert line.startswith(f"{path}: config: expected one for an encoder of width 16")
    assert from_pretrained(path, config=CONFIG).config is CONFIG
    line = refusal(lambda: from_pretrained(path, ema=True, config=CONFIG))
    assert line == f"{path}: ema: expected a moving average in extra_state, got none; load without ema"
    line = refusal(lambda: from_pretrained(path, head={"classes": 2}, config=CONFIG))
    assert line == f"{path}: head: expected none for a file of MiCo's, got {{'classes': 2}}"
    line = refusal(lambda: from_pretrained(path, model_type="unival", config=CONFIG))
    assert line == f"{path}: model_type: expected 'mico' or None for a file of MiCo's, got 'unival'"
    line = refusal(lambda: from_pretrained(path, model_type="mico", config=CONFIG, image_size=9))
    assert line == f"{path}: image_size: expected a multiple of the patches' 4 pixels, got 9"
    for side in (0, -4, "a"):
        line = refusal(lambda side=side: from_pretrained(path, model_type="mico", config=CONFIG, image_size=side))
        assert line == f"{path}: image_size: expected a multiple of the patches' 4 pixels, got {side}"
    line = refusal(lambda: from_pretrained(path, model_type="mico", config=3))
    assert line == f"{path}: config: expected a MicoConfig, got int 3"
    for shape in ([5, 16], [1, 4, 16], [1, 0, 16], [1, 5, 8]):
        written(path, CONFIG, **{"vision_encoder.visual.pos_embed": torch.zeros(shape)})
        for given in ({"config": CONFIG, "image_size": 12}, {}):
            line = refusal(lambda given=given: from_pretrained(path, model_type="mico", **given))
            assert line == (
                f"{path}: expected weights of patches [width, 3, side, side] and positions [1, grid ** 2 + 1, width], "
                f"got [16, 3, 4, 4] and {shape}"
            )
    written(path, CONFIG)
    other = dataclasses.replace(CONFIG, contra_dim=7)
    line = refusal(lambda: from_pretrained(path, model_type="mico", config=other))
    assert "contra_head_s.linear.weight [6, 12] instead of [7, 12]" in line and "\n" not in line
    torch.save({"a": torch.zeros(2)}, path)
    line = refusal(lambda: from_pretrained(path, model_type="mico"))
    kinds = "pretrain, retrieval, classify, encoder"
    assert line == f"{path}: model_type: expected weights of mico, or one of {kinds}, got a"
    line = refusal(lambda: from_pretrained(path, config=CONFIG))
    assert line == f"{path}: config: expected none but for a file of MiCo's, got one"
