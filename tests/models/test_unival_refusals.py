"""What UnIVAL does not take: one line each, before any work."""

import pytest
import torch
from data._refused import refused
from models._unival import CHANNELS, SOURCE, TARGET, maps, refusal, unival, unival_config

from onepeace_fast.models.unival import UnivalConfig
from onepeace_fast.models.unival.encoder import Encoder

IMAGE = maps()["image"]
PADDED = TARGET.clone()
PADDED[1] = 1


def feature_map(*size):
    return torch.zeros(4, CHANNELS, *size, dtype=torch.float64)


REFUSALS = {
    "a source longer than the positions": (
        {"source": torch.full((4, 10), 5)}, "source: expected 1 to 9 tokens, one for a position, got 10",
    ),
    "a target longer than the positions": (
        {"target": torch.full((4, 9), 5)}, "target: expected 1 to 8 tokens, one for a position, got 9",
    ),
    "a target without a column": (
        {"target": torch.zeros(4, 0, dtype=torch.int64)}, "target: expected 1 to 8 tokens, one for a position, got 0",
    ),
    "more codes than the window has": (
        {"target": torch.full((4, 6), 5), "code": [True] * 4},
        "code: expected at most 5 tokens, those of a window of 2 x 2, got 6",
    ),
    "floats as a source": ({"source": torch.zeros(4, 3)}, "source: expected int32 or int64 [rows, length], got "),
    "a token past the vocabulary": ({"source": SOURCE + 20}, "source: expected ids from 0 to 22, got others"),
    "a source of another device": (
        {"target": TARGET.to("meta")}, "target: expected a tensor on cpu, got one on meta; move it with .to('cpu')",
    ),
    "padding before a target": (
        {"target": TARGET.flip(1)},
        "target: expected texts with their padding, 1, behind them, got one with a token behind it",
    ),
    "fewer targets": ({"target": TARGET[:3]}, "target: expected a row for each of 4 texts, got 3"),
    "a flag too few": ({"code": [True]}, "code: expected True or False for each of 4 texts, got list [True]"),
    "a flag for all": ({"code": True}, "code: expected True or False for each of 4 texts, got bool True"),
    "words as flags": ({"code": ["no"] * 4}, "code: expected True or False for each of 4 texts, got list ['no', 'no'"),
    "a source that is no tensor": ({"source": [[5, 2]]}, "source: expected int32 or int64 [rows, length], got list"),
    "no samples": (
        {"source": SOURCE[:0], "target": TARGET[:0]}, "target: expected at least one text, got none",
    ),
    "a token behind a target's padding": (
        {"target": torch.tensor([[5, 1, 2]] * 4)},
        "target: expected texts with their padding, 1, behind them, got one with a token behind it",
    ),
    "a map that is no tensor": ({"image": [[1.0]]}, "image: expected a tensor, got list [[1.0]]"),
    "smoothing above all": ({"smoothing": 1.5}, "smoothing: expected a number from 0 to below 1, got 1.5"),
    "smoothing that is no number": ({"smoothing": "x"}, "smoothing: expected a number from 0 to below 1, got 'x'"),
    "a word for the encouraging loss": ({"encouraging": "no"}, "encouraging: expected True or False, got 'no'"),
    "a video with no frame": ({"video": feature_map(0, 2, 2)}, "video: expected at least one frame, got none"),
    "samples between two": (
        {"image": IMAGE, "samples": {"image": [0.5]}},
        "samples['image']: expected 1 different samples below 4, got [0.5]",
    ),
    "floats as samples": (
        {"image": IMAGE, "samples": {"image": torch.tensor([0.5])}},
        "samples['image']: expected 1 different samples below 4, got [0.5]",
    ),
    "one sample for a list": (
        {"image": IMAGE, "samples": {"image": 0}}, "samples['image']: expected 1 different samples below 4, got 0",
    ),
    "a map wider than the grid": (
        {"image": feature_map(2, 5)},
        "image: expected a map of at most 4 x 4 positions, got one that takes 2 x 5; give a smaller one",
    ),
    "a map taller than the grid": (
        {"video": feature_map(1, 5, 2)},
        "video: expected a map of at most 4 x 4 positions, got one that takes 5 x 2; give a smaller one",
    ),
    "an audio longer than the grid": (
        {"audio": feature_map(17, 1)},
        "audio: expected a map of at most 4 x 4 positions, got one that takes 5 x 5; give a smaller one",
    ),
    "a map without a place": (
        {"image": feature_map(0, 2)}, "image: expected a map of at most 4 x 4 positions, got one that takes 0 x 2",
    ),
    "a map of other channels": (
        {"image": feature_map(2, 2)[:, 1:]},
        f"image: expected floating point [rows, channels, height, width] of {CHANNELS} channels, got float64",
    ),
    "a video without frames": (
        {"video": feature_map(2, 2)},
        f"video: expected floating point [rows, channels, frames, height, width] of {CHANNELS} channels, got float64",
    ),
    "an unknown modality": ({"smell": IMAGE}, "input: expected some of image, video, audio, got ['smell']"),
    "samples of what is not given": (
        {"samples": {"image": [0]}}, "samples: expected some of none, got ['image']",
    ),
    "fewer images without their samples": (
        {"image": IMAGE}, "samples: expected the sample of each of the 1 rows of image, of 4 texts, got none",
    ),
    "a sample that is not there": (
        {"image": IMAGE, "samples": {"image": [4]}}, "samples['image']: expected 1 different samples below 4, got [4]",
    ),
    "a patch past the map": (
        {"image": feature_map(2, 2), "patches": {"image": torch.full((4, 1), 4)}},
        "patches['image']: expected 0 to 3, got others",
    ),
    "no patch": (
        {"image": feature_map(2, 2), "patches": {"image": torch.zeros(4, 0, dtype=torch.int64)}},
        "patches['image']: expected at least one for each of 4 rows, got int64 [4, 0]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize("name", REFUSALS)
def test_what_does_not_fit_is_refused_in_a_line_before_any_work(name, backend, monkeypatch):
    def work(*_):
        raise AssertionError("work began before the arguments were checked")

    monkeypatch.setattr(Encoder, "forward", work)
    inputs, says = REFUSALS[name]
    refused(lambda: unival(backend).loss(**{"source": SOURCE, "target": TARGET, **inputs}), "", says)


@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_a_sample_without_a_token_is_refused(backend):
    empty, model = SOURCE.clone(), unival(backend)
    empty[2] = 1
    says = "source: expected at least one token in each sample, got none in [2]"
    assert refusal(lambda: model.encode(empty)) == says
    assert model.encode(empty, image=IMAGE, samples={"image": [2]})["image"].isfinite().all()
    says = "target: expected at least one token in each sample, got none in [1]"
    assert refusal(lambda: model.loss(SOURCE, PADDED)) == says


@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_maps_of_another_dtype_are_cast_to_the_weights(backend):
    model, image = unival(backend), IMAGE.float()
    found = [model.encode(SOURCE[:1], image=x)["image"] for x in (image, image.double())]
    assert found[0].dtype == torch.float64
    assert torch.equal(*found)


def test_an_unknown_task_and_modalities_that_the_model_lacks_are_refused():
    refused(lambda: unival()("write"), "", "task: expected one of encode, logits, loss, generate, got 'write'")
    model = unival(audio=False)
    says = "input: expected some of image, video, got ['audio']"
    refused(lambda: model.encode(SOURCE[:2], audio=maps()["audio"]), "", says)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"embed_dim": 15}, "attention_heads: expected a divisor of embed_dim, 15, got 2"),
        ({"encoder_layers": 0}, "encoder_layers: expected a positive integer, got 0"),
        ({"video": 1}, "video: expected True or False, got 1"),
        ({"token_bucket_size": 1}, "token_bucket_size: expected at least 2, got 1"),
        ({"max_source_positions": 1025}, "max_source_positions: expected at most the 1024 that buckets are made for"),
        ({"code_image_size": 40}, "code_image_size: expected at most 32, 8 pixels for each of the positions, got 40"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(changed, says):
    refused(lambda: unival_config(**changed), "", says)


@pytest.mark.parametrize("name", ["scale_attn", "scale_resids", "entangle_position_embedding", "qk_norm"])
def test_another_model_of_upstream_s_code_is_refused(name):
    from onepeace_fast.models.unival.config import _FIXED

    args = {**_FIXED, name: not _FIXED[name]}
    refused(lambda: UnivalConfig.from_upstream(args, 9), "", f"{name}: expected {_FIXED[name]}, got {args[name]}; ")
