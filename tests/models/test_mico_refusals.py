"""What MiCo does not take: one line each, before any work."""

import dataclasses

import pytest
import torch
from models._mico import CAPTIONS, CONFIG, SIDE, TEXT, batch, frames, mico, refusal

from onepeace_fast.models.mico import ContextConfig, Masked, Mico, TextConfig, mask_captions
from onepeace_fast.models.mico.context import Tokens

GIVEN = batch()
DEPTH = {"depth": GIVEN["depth"]}
OF_DEPTH = {"depth": [0]}


def clip(*shape):
    return torch.zeros(*shape, dtype=torch.float64)


LOSSES = {
    "a sample without any modality": (
        {"samples": {**GIVEN["samples"], "vision": [2, 1], "depth": [1]}},
        "samples: expected at least one modality in each of 4, got none in [0]",
    ),
    "frames of unequal sizes": (
        {"vision": [clip(2, 3, SIDE, SIDE), clip(2, 3, SIDE, SIDE + 1)]},
        f"vision[1]: expected floating point frames [frames, 3, {SIDE}, {SIDE}], or of one channel "
        f"[frames, {SIDE}, {SIDE}], got float64 [2, 3, 8, 9] on cpu",
    ),
    "a row without a frame": (
        {"audio": [clip(0, SIDE, SIDE), clip(1, SIDE, SIDE)]}, "audio[0]: expected floating point frames [frames, 3, ",
    ),
    "a modality without rows": ({"audio": []}, "audio: expected at least one row, got none; leave the modality out"),
    "a subtitle without rows": (
        {"subtitle": torch.zeros(0, 4, dtype=torch.int64)},
        "subtitle: expected at least one row, got none; leave the modality out",
    ),
    "frames of two channels": (
        {"vision": [clip(2, 2, SIDE, SIDE)] * 2}, "vision[0]: expected floating point frames [frames, 3, ",
    ),
    "a path as frames": ({"vision": ["a.png", "b.png"]}, "vision[0]: expected floating point frames [frames, 3, "),
    "an unknown modality": (
        {"touch": clip(1, 1, 3, SIDE, SIDE)}, "frames: expected some of vision, audio, depth, normal, got ['touch']",
    ),
    "samples of what is not there": (
        {"samples": {**GIVEN["samples"], "touch": [0]}},
        "samples: expected those of ['audio', 'vision', 'normal', 'depth', 'subtitle'], got ['touch']",
    ),
    "a sample past the captions": (
        {"samples": {**GIVEN["samples"], "depth": [4]}}, "samples['depth']: expected samples below 4, got [4]",
    ),
    "two rows of one sample": (
        {"samples": {**GIVEN["samples"], "vision": [1, 1]}},
        "samples['vision']: expected another sample for each of 2 rows, got [1, 1]",
    ),
    "a subtitle that is too long": (
        {"subtitle": torch.full((2, 10), 5)}, "subtitle: expected 1 to 9 tokens, one for a position, got 10",
    ),
    "floats as captions": ({"text": clip(4, 3)}, "text: expected int32 or int64 [texts, length], got float64 [4, 3]"),
    "a single caption": (
        {"text": CAPTIONS[:1]}, "text: expected at least 2 samples, to pair one with another's, got 1",
    ),
    "a caption of one token": (
        {"text": torch.tensor([[5, 3], [4, 0], [5, 5], [6, 6]])},
        "text: expected at least 2 tokens in each caption, to hide one, got less in [1]",
    ),
    "what is hidden of other captions": (
        {"masked": Masked(CAPTIONS[:2], CAPTIONS[:2] > 5)},
        "masked: expected ids and hidden tokens of the captions' [4, 5], got others",
    ),
    "a pair in place of what is hidden": (
        {"masked": (CAPTIONS, CAPTIONS > 5)},
        "masked: expected ids and hidden tokens of the captions' [4, 5], got others",
    ),
    "nothing hidden": (
        {"masked": Masked(CAPTIONS, CAPTIONS < 0)}, "masked: expected at least one hidden token, got none",
    ),
    "hidden padding": (
        {"masked": Masked(CAPTIONS, CAPTIONS >= 0)},
        "masked: expected the captions' own padding, and nothing hidden there, got other padding",
    ),
    "words in place of padding": (
        {"masked": Masked(CAPTIONS.clamp(min=5), CAPTIONS > 5)},
        "masked: expected the captions' own padding, and nothing hidden there, got other padding",
    ),
    "frames that are no rows": (
        {"vision": 3}, "vision: expected a tensor or a list of rows of frames, got int 3",
    ),
    "a tensor of no rows": (
        {"vision": torch.tensor(3.0)}, "vision: expected a tensor or a list of rows of frames, got float32 [] on cpu",
    ),
    "one sample for all rows": (
        {"samples": {**GIVEN["samples"], "vision": 1}}, "samples['vision']: expected integers, got int 1",
    ),
    "samples without their modalities": (
        {"samples": [0, 1, 2, 3]},
        "samples: expected modalities with the sample of each row, got list [0, 1, 2, 3]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_losses_refuse_in_one_line_before_any_work(name):
    changed, says = LOSSES[name]
    model = mico()

    def works(*given):
        raise ValueError("it works")

    model.vision_encoder.visual.register_forward_hook(works)
    line = refusal(lambda: model.losses(**{"text": CAPTIONS, **GIVEN, **changed}))
    assert line.startswith(says) and "\n" not in line


def test_embed_match_and_encode_refuse_in_one_line():
    model = mico()
    assert refusal(model.embed) == "embed: expected a text or at least one modality, got none"
    assert refusal(model.encode) == "frames: expected at least one modality, got none"
    line = refusal(lambda: model.match(CAPTIONS[:2], of=[0, 1], **DEPTH))
    assert line == "of: expected samples from 0 to 0, got [0, 1]"
    line = refusal(lambda: model.match(CAPTIONS[:2], of=[0], **DEPTH))
    assert line == "of: expected a sample for each of 2 texts, got 1"
    for of, got in (([0.5, 0.2], "list [0.5, 0.2]"), ("00", "list ['0', '0']"), (0, "int 0")):
        assert refusal(lambda of=of: model.match(CAPTIONS[:2], of=of, **DEPTH)) == f"of: expected integers, got {got}"
    line = refusal(lambda: model.embed(samples={"depth": [10**12]}, **DEPTH))
    assert line.endswith(f"in each of {10**12 + 1}, got none in [0, 1, 2, 3, 4, 5, 6, 7] and more")
    line = refusal(lambda: model.embed(samples={"depth": [1]}, **DEPTH))
    assert line == "samples: expected at least one modality in each of 2, got none in [0]"
    line = refusal(lambda: model.encode(vision=frames()["vision"], audio=[clip(1, SIDE, SIDE).to("meta")]))
    assert line == "audio[0]: expected a tensor on cpu, got one on meta; move it with .to('cpu')"
    assert (
        refusal(lambda: model("write")) == "task: expected one of encode, contexts, embed, match, losses, got 'write'"
    )
    assert refusal(lambda: Mico(CONFIG, "fast")).startswith("backend: expected ")


def test_a_context_refuses_what_it_has_no_weights_for():
    model = mico()
    assert refusal(lambda: model.context({}, True)) == "context: expected at least one modality, got none"
    tokens = Tokens(clip(1, 5, 16), [1], [0])
    line = refusal(lambda: model.context({"touch": tokens}, True))
    assert line == "context: expected some of vision, audio, depth, normal, subtitle, got ['touch']"


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"contra_dim": 0}, "contra_dim: expected a positive integer, got 0"),
        ({"frames": {}}, "frames: expected at least one modality, got none"),
        ({"frames": {"vision": 0}}, "frames['vision']: expected a positive integer, got 0"),
        *(
            (
                {"frames": {name: 2}},
                f"frames: expected names that are no names of inputs, results or heads, got '{name}'",
            )
            for name in (
                "text",
                "union",
                "t",
                "v",
                "va",
                "samples",
                "masked",
                "generator",
                "of",
                "task",
                "self",
                "caption",
                "hidden",
            )
        ),
        ({"matching_weight": -1.0}, "matching_weight: expected a weight of at least 0, got -1.0"),
        ({"pool": 1}, "pool: expected True or False, got 1"),
        ({"vision": {"drop_path_rate": "x"}}, "drop_path_rate: expected a probability in [0, 1), got 'x'"),
    ],
)
def test_configurations_that_make_no_model_are_refused(changed, says):
    assert refusal(lambda: made(changed)) == says


def made(changed):
    own = {"vision": dataclasses.replace(CONFIG.vision, **changed["vision"])} if "vision" in changed else {}
    return dataclasses.replace(CONFIG, **changed | own)


def test_text_configurations_are_checked():
    assert refusal(lambda: TextConfig(width=7)) == "heads: expected a divisor of width, 7, got 12"
    assert refusal(lambda: TextConfig(vocab_size=50)) == "mask_id: expected a token below vocab_size, 50, got 103"
    assert ContextConfig().unions.keys() == {"va", "id", "vs", "vas"}
    assert mask_captions(CAPTIONS, TEXT).ids.shape == CAPTIONS.shape
