"""EVA's encoder over packed frames and padded ones, its configurations, DropPath, and how it starts."""

import dataclasses
import itertools

import pytest
import torch
from models._mico import VISION, refusal
from models._small import BACKENDS, randomise
from torch._subclasses.fake_tensor import FakeTensorMode

from onepeace_fast.models.mico import EvaConfig, EvaEncoder
from onepeace_fast.models.mico.context import frame_rows, pooled
from onepeace_fast.models.mico.encoder import rope_angles
from onepeace_fast.models.mico.layers import DropPath

EVA_2 = {"rope": True, "swiglu": True, "sub_layer_norm": True, "rope_grid": 5}
KINDS = {
    "EVA-01": {}, "EVA-02": EVA_2, "heads of 88": {"width": 176, "head_width": 88}, "rope alone": {"rope": True},
    "Sub-LayerNorm alone": {"sub_layer_norm": True}, "SwiGLU alone": {"swiglu": True},
}  # fmt: skip


def encoder(backend="fused", dtype=torch.float64, **changed):
    model = EvaEncoder(dataclasses.replace(VISION, **changed), backend).to(dtype)
    randomise(model)
    return model.eval()


def pixels(*shape, dtype=torch.float64, seed=2):
    return torch.randn(*shape, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_frames_have_the_values_and_gradients_of_padded_ones(kind):
    found = []
    for backend in BACKENDS:
        model, x = encoder(backend, **KINDS[kind]), pixels(2, 3).requires_grad_()
        out = model(x)
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)).sum().backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        found.append({"out": out.detach(), "frames": x.grad, **grads})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-9, atol=1e-11, msg=lambda text: f"{name}: {text}")  # noqa: B023
    assert not found[0]["head.weight"].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frame_does_not_see_another(backend):
    model, x = encoder(backend, **EVA_2), pixels(3)
    changed = x.clone()
    changed[1] = 7.0
    torch.testing.assert_close(model(changed)[[0, 2]], model(x)[[0, 2]], rtol=1e-12, atol=1e-12)
    assert model(x[:0]).shape == (0, 5, 16)


def test_angles_are_of_row_and_column_and_stretched_over_the_grid_they_were_made_for():
    config = EvaConfig(image_size=48, patch_size=16, width=16, head_width=8, rope=True, rope_grid=6)
    angles = rope_angles(config).view(3, 3, 8)
    for row in range(3):
        for column in range(3):
            expected = [2.0 * row, 2.0 * row, 0.02 * row, 0.02 * row, 2.0 * column, 2.0 * column, *[0.02 * column] * 2]
            torch.testing.assert_close(angles[row, column], torch.tensor(expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_drop_path_drops_frames_from_branches_and_scales_the_others(backend, monkeypatch):
    model, x = encoder(backend, drop_path_rate=0.5).train(), pixels(4)
    factors = torch.tensor([[[1, 1, 1, 1], [1, 1, 1, 1]], [[0, 2, 0, 2], [2, 0, 0, 2]]], dtype=torch.float32)
    seen = []

    def drawn(rates, count):
        seen.append((rates, count))
        return factors

    monkeypatch.setattr("onepeace_fast.models.mico.encoder.draw_drop_path", drawn)
    found = model(x)
    assert seen == [([0.0, 0.5], 4)]
    plain = encoder("reference")
    first = []
    plain.blocks[0].register_forward_hook(lambda module, given, output: first.append(output))
    plain(x)
    for frame in range(4):
        state, block = first[0][frame : frame + 1], plain.blocks[1]
        state = state + factors[1, 0, frame] * block.attn(block.norm1(state), None, None)
        state = state + factors[1, 1, frame] * block.mlp(block.norm2(state), False)
        torch.testing.assert_close(found[frame], plain.norm(state)[0], rtol=1e-9, atol=1e-11)
    model.eval()
    torch.testing.assert_close(model(x), plain(x), rtol=1e-9, atol=1e-11)
    assert len(seen) == 1 and DropPath._fields == ("factor", "sample")


def test_configurations_are_read_of_upstream_s_json_and_others_are_refused():
    giant = {"image_size": 224, "layers": 40, "width": 1408, "head_width": 88, "mlp_ratio": 4.3637, "patch_size": 14,
             "eva_model_name": "eva-clip-g-14-x", "drop_path_rate": 0.4, "xattn": True, "fusedLN": True}  # fmt: skip
    assert EvaConfig.from_upstream(giant, 1024) == EvaConfig(drop_path_rate=0.4)
    base = {"image_size": 224, "layers": 12, "width": 768, "head_width": 64, "patch_size": 16, "mlp_ratio": 2.6667,
            "rope": True, "pt_hw_seq_len": 16, "intp_freq": True, "naiveswiglu": True, "subln": True}  # fmt: skip
    found = EvaConfig.from_upstream(base, 512)
    assert (found.ffn_dim, found.heads, found.tokens, found.rope, found.swiglu) == (2048, 12, 197, True, True)
    for changed, says in (
        ({"postnorm": True}, "vision_cfg.postnorm: expected False, got True; this library has no such encoder"),
        ({"ls_init_value": 0.1}, "vision_cfg.ls_init_value: expected None, got 0.1; this library has no such encoder"),
        ({"window": 3}, "vision_cfg: expected EVA-CLIP's settings, got window"),
        ({"rope": True}, "vision_cfg.intp_freq: expected True for a grid of 14, whose angles are those of 16, got"),
    ):
        given = {**base, "intp_freq": False, "rope": False, **changed}
        assert refusal(lambda given=given: EvaConfig.from_upstream({**given, "patch_size": 16}, 8)).startswith(says)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"width": 17}, "head_width: expected a divisor of width, 17, got 8"),
        ({"patch_size": 3}, "patch_size: expected a divisor of image_size, 8, got 3"),
        ({"layers": 0}, "layers: expected a positive integer, got 0"),
        ({"rope": 1}, "rope: expected True or False, got 1"),
        ({"rope": True, "head_width": 2}, "head_width: expected a multiple of 4, pairs of rows and of columns, got 2"),
        ({"drop_path_rate": 1.0}, "drop_path_rate: expected a probability in [0, 1), got 1.0"),
    ],
)
def test_sizes_that_make_no_encoder_are_refused(changed, says):
    assert refusal(lambda: dataclasses.replace(VISION, **changed)) == says


def test_norms_have_upstream_s_epsilons_of_which_one_differs():
    norms = {
        (flag, name.rpartition(".")[2]): module.eps
        for flag in (False, True)
        for name, module in encoder(sub_layer_norm=True, swiglu=flag).named_modules()
        if isinstance(module, torch.nn.LayerNorm)
    }
    assert norms.pop((False, "ffn_ln")) == 1e-5
    assert len(norms) == 9 and {*norms.values()} == {1e-6}


def test_a_state_dict_takes_upstream_s_buffers_and_refuses_others():
    model = encoder(**EVA_2)
    state, angles = model.to_upstream_state_dict(), model.carried()
    assert len(angles) == 2 + 2 * 2
    model.load_upstream_state_dict({**state, **angles})
    for wrong in (angles["rope.freqs_cos"], 3):
        given = {**state, "blocks.1.attn.rope.freqs_sin": wrong}
        assert refusal(lambda given=given: model.load_upstream_state_dict(given)) == (
            "state_dict: expected MiCo's own, got one whose blocks.1.attn.rope.freqs_sin differs from the one that "
            "follows from the others"
        )
    line = refusal(lambda: encoder().load_upstream_state_dict({**encoder().to_upstream_state_dict(), **angles}))
    assert "unexpected: blocks.0.attn.rope.freqs_cos" in line


@pytest.mark.parametrize("shape", [(1, 3, 8, 9), (1, 1, 8, 8), (3, 8, 8)])
def test_frames_of_another_size_are_refused(shape):
    line = refusal(lambda: encoder()(torch.zeros(shape, dtype=torch.float64)))
    assert line == f"frames: expected floating point frames [..., 3, 8, 8], got float64 {list(shape)} on cpu"


def test_frame_tables_are_stretched_as_torch_s_nearest_interpolation_does():
    assert frame_rows(4, 6) == (0, 0, 1, 2, 2, 3) and frame_rows(4, 4) == (0, 1, 2, 3) and frame_rows(3, 1) == (0,)
    exact = [i * 14 // 46 for i in range(46)]
    assert [i for i, row in enumerate(frame_rows(14, 46)) if row != exact[i]] != []
    for rows, count in itertools.product(range(1, 33), range(1, 65)):
        places = torch.arange(rows, dtype=torch.float32)[None, None]
        expected = torch.nn.functional.interpolate(places, count, mode="nearest").flatten().tolist()
        assert list(frame_rows(rows, count)) == expected, (rows, count)


def test_frame_rows_are_numbers_in_a_mode_of_fake_tensors():
    with FakeTensorMode():
        assert frame_rows(5, 71) == tuple(i * 5 // 71 for i in range(71))


def test_frames_are_pooled_row_by_row():
    x = torch.arange(12.0).view(6, 1, 2)
    torch.testing.assert_close(pooled(x, [2, 1, 3]), torch.tensor([[1.0, 2.0], [4.0, 5.0], [8.0, 9.0]]))
    torch.testing.assert_close(pooled(x, [3, 3]), torch.tensor([[2.0, 3.0], [8.0, 9.0]]))


def test_parameters_start_as_upstream_s():
    torch.manual_seed(0)
    model = EvaEncoder(EvaConfig(image_size=32, patch_size=4, width=64, head_width=32, layers=3, ffn_dim=96))
    deviations = {"cls_token": 0.02, "pos_embed": 0.02, "blocks.2.attn.qkv.weight": 0.02, "head.weight": 2e-5,
                  "blocks.1.attn.proj.weight": 0.01, "blocks.1.mlp.fc2.weight": 0.01}  # fmt: skip
    found = dict(model.named_parameters())
    for name, deviation in deviations.items():
        assert found[name].std().item() == pytest.approx(deviation, rel=0.2), name
    assert not found["blocks.0.attn.q_bias"].any() and not found["blocks.0.mlp.fc1.bias"].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_frames_of_another_dtype_are_cast_to_the_weights(backend):
    model, frames = encoder(backend), pixels(2, dtype=torch.float32)
    found = [model(x) for x in (frames, frames.double())]
    assert found[0].dtype == torch.float64
    assert torch.equal(*found)
