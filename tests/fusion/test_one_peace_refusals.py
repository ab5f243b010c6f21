"""What ``fuse`` refuses of modules that resemble ONE-PEACE's, and in which words."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from onepeace_fast import fuse
from tests.fusion._one_peace import DIM, Wrapper


def refusal(change: Any, **options: Any) -> str:
    model = Wrapper(**options)
    change(model)
    before = [dict(module.__dict__) for module in model.modules()]
    with pytest.raises(ValueError, match="resembles ONE-PEACE, but ") as caught:
        fuse(model)
    assert [dict(module.__dict__) for module in model.modules()] == before
    return str(caught.value).split("but ", 1)[1].split(";")[0]


class OtherNorm(nn.LayerNorm):
    pass


def put(path: str, value: Any) -> Any:
    parent, _, name = path.rpartition(".")

    def change(model: nn.Module) -> None:
        owner = model.get_submodule(parent)
        if name.isdigit():
            owner[int(name)] = value  # type: ignore[index]
        else:
            setattr(owner, name, value)

    return change


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("layers.1.image_ffn.0.act", nn.ReLU6(), "act: expected a GELU, got ReLU6"),
        ("layers.1.text_ffn.0.act", nn.GELU("tanh"), "act: expected a GELU by erf, got GELU(approximate='tanh')"),
        ("layers.0.attn_ln", OtherNorm(DIM), "attn_ln: expected a LayerNorm, got OtherNorm"),
        ("layers.0.attn_ln", nn.LayerNorm(DIM, bias=False),
         f"attn_ln: expected a LayerNorm of {DIM} with a weight and a bias, got {nn.LayerNorm(DIM, bias=False)}"),
        ("layers.0.self_attn.k_proj", nn.Linear(DIM, DIM), "k_proj: expected no bias, got one"),
        ("layers.0.self_attn.q_proj", nn.Linear(DIM, 8),
         f"q_proj: expected a Linear from {DIM} to {DIM}, got Linear(in_features={DIM}, out_features=8, bias=True)"),
        ("layers.1.self_attn.scaling", 1.0, "scaled by head_dim ** -0.5, got 4 of 8, scaled by 1.0"),
        ("layers.1.text_ffn.0.wi_1", nn.Linear(DIM, 48), "wi_1: expected no bias, got one"),
        ("layers.1.text_ffn.1", nn.Linear(2, 2), "1: expected dropout with a probability p, got Linear"),
        ("layers.1.audio_ffn", nn.Sequential(nn.Identity()),
         "audio_ffn: expected GeGLU, dropout, norm and projection, got 1 modules"),
        ("layers.1.drop_path_prob", 1.0, "drop_path_prob: expected a probability in [0, 1), got 1.0"),
        ("audio_layer_norm", OtherNorm(DIM), "audio_layer_norm: expected a LayerNorm, got OtherNorm"),
        ("layers.0.forward", print, "layers.0: expected the class's forward, got one of its own"),
        ("layers.0.self_attn.forward", print, "self_attn: expected the class's forward, got one of its own"),
    ],
    ids=lambda value: value if isinstance(value, str) and "layer" in value and ":" not in value else "",
)  # fmt: skip
def test_look_alikes_are_refused(path: str, value: Any, message: str):
    assert refusal(put(f"fusion_model.{path}", value)).endswith(message)


def test_adapters_and_encoders_that_are_others_are_refused():
    def unlike(model: Any) -> None:
        model.text_adapter.rp_bucket[3, 4] = 0

    assert refusal(unlike) == "text_adapter.rp_bucket: expected buckets by the distance of two tokens, got others"
    expected = "audio_adapter.rel_pos_table_list.0: expected an Embedding of 10 rows and 4 heads, got Embedding(9, 4)"
    assert refusal(put("audio_adapter.rel_pos_table_list.0", nn.Embedding(9, 4))) == expected
    expected = "image_adapter.rel_pos_table_list: expected 1 table or 2, as layers, got 3"
    tables = nn.ModuleList(nn.Embedding(28, 4) for _ in range(3))
    assert refusal(put("image_adapter.rel_pos_table_list", tables)) == expected
    assert refusal(lambda model: model.__delattr__("image_adapter")) == (
        "image_adapter: expected the adapter whose tables hold the bias, got none"
    )
    assert refusal(put("image_adapter", nn.Identity())) == (
        "image_adapter: expected upstream's adapter, got Identity without get_rel_pos_bias"
    )

    assert refusal(lambda model: None, modalities=()) == (
        "fusion_model.layers.0: expected text_ffn, image_ffn or audio_ffn, got none of them"
    )

    class LayerDrop(nn.ModuleList):
        def __iter__(self) -> Any:
            raise AssertionError  # it would draw random numbers

    assert refusal(lambda model: setattr(model.fusion_model, "layers", LayerDrop([*model.fusion_model.layers]))) == (
        "fusion_model.layers: expected a ModuleList, got LayerDrop"
    )
    with pytest.raises(ValueError, match="resembles ONE-PEACE, but an encoder alone: expected it as fusion_model"):
        fuse(Wrapper().fusion_model)
