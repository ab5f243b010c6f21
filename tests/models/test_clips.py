"""Embeddings of clips, each as of the clip alone."""

import pytest
import torch
from data._refused import refused
from models._small import BACKENDS, samples_of, small_config, small_model

from onepeace_fast.models.clips import embed_clips

FRAMES = (9, 4, 9, 17, 4, 5)


def clips(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    # One sample more gives no frame more.
    return [torch.randn(samples_of(n) + n % 2, generator=generator, dtype=torch.float64).to(dtype) for n in FRAMES]


def padded(model, given):
    longest = max(map(len, given))
    audio = torch.stack([torch.nn.functional.pad(clip, (0, longest - len(clip))) for clip in given])
    frames = [model.encoder.adapter("audio").frames(len(clip)) for clip in given]
    return model.embed(audio=audio, audio_padding=torch.arange(max(frames) + 1) > torch.tensor(frames)[:, None])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_clip_is_embedded_as_it_is_alone_whatever_is_beside_it(backend):
    model, given = small_model(backend), clips()
    with torch.no_grad():
        alone = torch.cat([model.embed(audio=clip[None]) for clip in given])
        torch.testing.assert_close(embed_clips(model, given), alone, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(embed_clips(model, given[4:1:-1]), alone[[4, 3, 2]], rtol=1e-12, atol=1e-12)
        beside = padded(model, given)
    assert (beside[3] - alone[3]).abs().max() < 1e-12  # the longest has no padding
    assert (beside[[0, 1, 4, 5]] - alone[[0, 1, 4, 5]]).abs().amax(1).min() > 1e-4


def test_clips_of_one_length_go_through_the_convolutions_together_and_all_through_the_layers_at_once():
    model, rows, calls = small_model("fused"), [], []
    model.encoder.adapter("audio").embed_audios.register_forward_hook(lambda *_: rows.append(len(_[1][0])))
    model.encoder.fusion_model.register_forward_pre_hook(lambda *_: calls.append(len(_[1][0])))
    embed_clips(model, clips())
    assert sorted(rows) == [1, 1, 2, 2]
    assert calls == [sum(FRAMES) + len(FRAMES)]


def test_clips_take_the_models_dtype():
    model = small_model("fused", dtype=torch.bfloat16)
    assert embed_clips(model, clips(torch.float32)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("given", "start"),
    [
        ([], "clips: expected at least one, got none"),
        ([torch.zeros(90), torch.zeros(1, 90)], "clips[1]: expected floating point [samples], got float32 [1, 90]"),
        ([torch.zeros(90, dtype=torch.int64)], "clips[0]: expected floating point [samples], got int64 [90]"),
        ([torch.zeros(90), torch.zeros(3)], "audio: expected samples for one frame at least, got 3"),
    ],
)
def test_what_is_no_clip_is_refused(given, start):
    refused(lambda: embed_clips(small_model("fused", dtype=torch.float32), given), start)


def test_a_model_without_audio_is_refused():
    model = small_model("fused", small_config(audio=None, decoder={"audio": None}))
    refused(lambda: embed_clips(model, clips()), "clips: expected a model with audio")
