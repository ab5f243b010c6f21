"""What the denoising task hides: exact counts, what is never hidden, and how likely each choice is."""

import itertools
import math
import random
from collections import Counter

import pytest
import torch
from data._refused import refused
from models._small import BACKENDS, PADDING, VOCABULARY, audio_batch, image_batch, small_model

from onepeace_fast.training.masks import audio_language_masks, vision_language_masks

END = 2
EMPTY = None  # a row of padding alone
# Tokens of each word, row by row: one word, one long word, no word, no text, exact shares, many words.
CAPTIONS = [[1], [6], [], EMPTY, [1] * 20, [2, 1, 3, 1, 1, 4, 1], [1, 1], [3] * 23, [1] * 5]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def captions(words, width=None):
    """Token ids and word starts of captions given as the tokens of each word."""
    lengths = [0 if row is EMPTY else sum(row) + 1 for row in words]
    width = max(lengths, default=0) if width is None else width
    text = torch.full((len(words), width), PADDING)
    starts = torch.zeros(len(words), width, dtype=torch.bool)
    for row, (sizes, length) in enumerate(zip(words, lengths, strict=True)):
        if sizes is not EMPTY:
            text[row, : length - 1] = torch.randint(4, VOCABULARY, (length - 1,), generator=seeded(row))
            text[row, length - 1] = END
            starts[row, [sum(sizes[:i]) for i in range(len(sizes))]] = True
    return text, starts


def draw(words=CAPTIONS, patches=256, seed=0):
    return vision_language_masks(*captions(words), patches, seeded(seed))


def draw_audio(words=CAPTIONS, frames=None, seed=0, width=None):
    frames = [0, 1, 2, 7, 8, 40, 100, 749, 13] if frames is None else frames
    return audio_language_masks(*captions(words), frames, seeded(seed), width)


def hidden_words(row, sizes):
    """Which words a row of a mask hides, each asserted to be hidden whole or not at all."""
    words, column = [], 1
    for size in sizes:
        flags = row[column : column + size].tolist()
        assert len(set(flags)) == 1, flags
        words.append(flags[0])
        column += size
    return words


def runs(mask):
    """Number of unbroken runs of True in each row."""
    return (mask[:, 1:] & ~mask[:, :-1]).sum(1)


def assert_equally_likely(counts, outcomes):
    """Every possible outcome was drawn, none impossible, each within five deviations of its share."""
    draws = sum(counts.values())
    assert set(counts) == set(outcomes)
    deviation = math.sqrt(draws * (1 - 1 / len(outcomes)) / len(outcomes))
    assert all(abs(count - draws / len(outcomes)) < 5 * deviation for count in counts.values()), counts


def test_shapes_and_dtypes_are_the_losses_own():
    text, _ = captions(CAPTIONS)
    rows, length = text.shape
    masks = draw(patches=9)
    assert {name: tuple(mask.shape) for name, mask in masks.items()} == {
        "text": (rows, 1 + length), "vl_text": (rows, 1 + length), "image": (rows, 10), "vl_image": (rows, 10),
    }  # fmt: skip
    audio = draw_audio()
    assert {name: tuple(mask.shape) for name, mask in audio.items()} == {
        "al_text": (rows, 1 + length), "audio": (rows, 750), "al_audio": (rows, 750),
    }  # fmt: skip
    assert all(mask.dtype == torch.bool for mask in [*masks.values(), *audio.values()])


@pytest.mark.parametrize("seed", range(5))
def test_cls_end_and_padding_are_never_hidden(seed):
    text, _ = captions(CAPTIONS)
    masks = {**draw(seed=seed), **draw_audio(seed=seed)}
    assert not any(mask[:, 0].any() for mask in masks.values())
    for name in ("text", "vl_text", "al_text"):
        assert not masks[name][:, 1:][(text == END) | (text == PADDING)].any(), name


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("name", "hundredths"), [("text", 15), ("al_text", 40)])
def test_text_is_hidden_by_whole_words_and_their_share_is_rounded_up(name, hundredths, seed):
    mask = {**draw(seed=seed), **draw_audio(seed=seed)}[name]
    for row, sizes in zip(mask, CAPTIONS, strict=True):
        words = hidden_words(row, sizes or [])
        assert sum(words) == -(-hundredths * len(words) // 100)


@pytest.mark.parametrize("seed", range(5))
def test_the_pair_hides_single_tokens_that_the_text_pass_left_visible(seed):
    masks = draw(seed=seed)
    assert not (masks["text"] & masks["vl_text"]).any()
    split = 0
    for row, alone, sizes in zip(masks["vl_text"], masks["text"], CAPTIONS, strict=True):
        tokens = sum(sizes or [])
        assert row.sum() == min(2 * tokens // 5, tokens - int(alone.sum()))
        words = row[1 : 1 + tokens].split(sizes or [0])
        split += sum(0 < int(word.sum()) < len(word) for word in words)
    assert split > 0


def test_a_long_word_that_the_text_pass_hides_leaves_the_pair_what_remains():
    masks = draw([[6], [8, 1], [9, 1, 1]] * 20)
    counts = {(int(t.sum()), int(v.sum())) for t, v in zip(masks["text"], masks["vl_text"], strict=True)}
    assert counts == {(6, 0), (8, 1), (1, 3), (9, 2), (1, 4)}


@pytest.mark.parametrize("patches", [*range(2, 40), 196, 256, 576])
def test_the_image_pass_hides_three_quarters_and_the_pair_what_it_saw_and_others(patches):
    masks = draw([[2, 1]] * 4, patches)
    alone, pair = (masks[name][:, 1:] for name in ("image", "vl_image"))
    assert alone.sum(1).tolist() == [3 * patches // 4] * 4
    assert pair.sum(1).tolist() == [11 * patches // 16] * 4
    assert pair[~alone].all()


def test_256_patches_are_192_hidden_then_64_and_112():
    masks = draw()
    alone, pair = (masks[name][:, 1:] for name in ("image", "vl_image"))
    assert set(alone.sum(1).tolist()) == {192}
    assert set((pair & ~alone).sum(1).tolist()) == {64}
    assert set((pair & alone).sum(1).tolist()) == {112}


def test_one_patch_is_hidden_in_the_pair_since_the_image_pass_saw_it():
    masks = draw([[1]], patches=1)
    assert masks["image"].tolist() == [[False, False]]
    assert masks["vl_image"].tolist() == [[False, True]]


def test_every_choice_of_words_is_as_likely():
    sizes = [2, 1, 3, 1, 1, 4, 1]
    mask = draw([sizes] * 6000, patches=1)["text"]
    counts = Counter(tuple(hidden_words(row, sizes)) for row in mask)
    assert_equally_likely(counts, [tuple(i in pair for i in range(7)) for pair in itertools.combinations(range(7), 2)])


def test_every_choice_of_the_pairs_tokens_is_as_likely():
    masks = draw([[1] * 5] * 9000, patches=1)
    counts = Counter(zip(*(map(tuple, masks[name][:, 1:-1].tolist()) for name in ("text", "vl_text")), strict=True))
    outcomes = [
        (tuple(i == word for i in range(5)), tuple(i in pair for i in range(5)))
        for word in range(5)
        for pair in itertools.combinations([i for i in range(5) if i != word], 2)
    ]
    assert_equally_likely(counts, outcomes)


def test_every_choice_of_patches_alone_and_in_the_pair_is_as_likely():
    masks = draw([[1]] * 6000, patches=4)
    counts = Counter(zip(*(map(tuple, masks[name][:, 1:].tolist()) for name in ("image", "vl_image")), strict=True))
    outcomes = [
        (tuple(i != seen for i in range(4)), tuple(i in (seen, other) for i in range(4)))
        for seen, other in itertools.permutations(range(4), 2)
    ]
    assert_equally_likely(counts, outcomes)


def test_every_one_of_256_patches_is_hidden_as_often():
    masks = draw([[1]] * 4000)
    for name, share in (("image", 0.75), ("vl_image", 0.6875)):
        frequency = masks[name][:, 1:].double().mean(0)
        deviation = math.sqrt(share * (1 - share) / 4000)
        assert (frequency - share).abs().max() < 5 * deviation
        assert frequency.std() == pytest.approx(deviation, rel=0.3)  # not smoother than chance either


def test_audio_is_hidden_in_exact_shares_of_each_clips_own_frames():
    frames = [*range(61), 749]
    masks = draw_audio([[1]] * len(frames), frames)
    for name, hundredths in (("audio", 55), ("al_audio", 45)):
        assert masks[name].sum(1).tolist() == [hundredths * count // 100 for count in frames]
        for row, count in zip(masks[name], frames, strict=True):
            assert not row[1 + count :].any()


def naive_spans(frames, share, chance):
    """The audio rule, one frame after another."""
    hidden = [False] * frames
    for _ in range(int(frames * (share + 0.1) / 5)):
        centre = chance.randrange(frames)
        for frame in range(centre - 2, centre + 3):
            if 0 <= frame < frames:
                hidden[frame] = True
    while (surplus := sum(hidden) - int(frames * share)) != 0:
        frame = chance.choice([i for i in range(frames) if hidden[i] == (surplus > 0)])
        hidden[frame] = not hidden[frame]
    return hidden


@pytest.mark.parametrize(("name", "share"), [("audio", 0.55), ("al_audio", 0.45)])
@pytest.mark.parametrize("frames", [9, 31])
def test_spans_are_distributed_as_those_of_the_naive_rule(name, share, frames):
    chance, draws = random.Random(0), 3000
    want = torch.tensor([naive_spans(frames, share, chance) for _ in range(draws)])
    got = draw_audio([[1]] * draws, [frames] * draws)[name][:, 1:]
    spread = math.sqrt(2 * 0.25 / draws)
    assert (got.double().mean(0) - want.double().mean(0)).abs().max() < 5 * spread
    together = [(mask[:, :, None] & mask[:, None, :]).double().mean(0) for mask in (got, want)]
    assert (together[0] - together[1]).abs().max() < 5 * spread


@pytest.mark.parametrize(("name", "share"), [("audio", 0.55), ("al_audio", 0.45)])
def test_a_clips_hidden_frames_stand_in_spans(name, share):
    mask = draw_audio([[1]] * 40, [749] * 40)[name]
    length = (mask.sum() / runs(mask).sum()).item()
    independent = 1 / (1 - share)
    assert length > 1.5 * independent


def test_the_two_passes_over_a_clip_are_independent():
    masks = draw_audio([[1]] * 200, [749] * 200)
    both = (masks["audio"] & masks["al_audio"])[:, 1:].double().mean().item()
    assert both == pytest.approx(0.55 * 0.45, rel=0.03)


def test_masks_depend_on_the_generator_alone_and_leave_the_global_one_alone():
    before = torch.get_rng_state()
    for function in (draw, draw_audio):
        first, again, other = function(seed=1), function(seed=1), function(seed=2)
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert all(not torch.equal(first[name], other[name]) for name in first)
    assert torch.equal(torch.get_rng_state(), before)


def test_consecutive_draws_of_one_generator_differ():
    generator, (text, starts) = seeded(), captions(CAPTIONS)
    first, second = (vision_language_masks(text, starts, 256, generator) for _ in range(2))
    assert all(not torch.equal(first[name], second[name]) for name in first)


def test_a_wider_batch_pads_the_audio_masks():
    narrow, wide = draw_audio(), draw_audio(width=760)
    for name in ("audio", "al_audio"):
        assert wide[name].shape[1] == 761
        assert torch.equal(wide[name][:, :750], narrow[name])
        assert not wide[name][:, 750:].any()


def test_batches_without_rows_or_tokens_have_empty_masks():
    assert {name: tuple(mask.shape) for name, mask in draw([], patches=4).items()} == {
        "text": (0, 1), "vl_text": (0, 1), "image": (0, 5), "vl_image": (0, 5),
    }  # fmt: skip
    masks = draw_audio([EMPTY, EMPTY], [0, 0])
    assert all(mask.tolist() == [[False], [False]] for mask in masks.values())


def test_rows_without_words_hide_nothing():
    masks = {**draw([[], EMPTY, [1]]), **draw_audio([[], EMPTY, [1]], [3, 3, 3])}
    for name in ("text", "vl_text", "al_text"):
        assert not masks[name][:2].any(), name
    assert masks["text"][2].tolist() == masks["al_text"][2].tolist() == [False, True, False]
    assert not masks["vl_text"][2].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_losses_take_the_masks(backend):
    text, starts = captions([[1, 2, 1], [4, 1], [1], []])
    model, frames = small_model(backend), [9, 4, 6, 1]
    audio, padding = audio_batch(frames)
    masks = vision_language_masks(text, starts, 9, seeded())
    losses = model.vision_language_loss(text=text, image=image_batch(4, grid=3), masks=masks)
    masks = audio_language_masks(text, starts, frames, seeded())
    losses |= model.audio_language_loss(text=text, audio=audio, audio_padding=padding, masks=masks)
    assert all(math.isfinite(value.item()) for value in losses.values())


def test_the_loss_refuses_a_batch_of_captions_too_short_for_the_pair():
    text, starts = captions([[1], [2], [1, 1]])
    masks = vision_language_masks(text, starts, 9, seeded())
    with pytest.raises(ValueError, match=r"^masks\['vl_text'\]: [^\n]*hidden token in the whole batch"):
        small_model("reference").vision_language_loss(text=text, image=image_batch(3, grid=3), masks=masks)


def changed(values, **entries):
    """A copy with some entries of row 1 replaced."""
    values = values.clone()
    for column, value in entries.items():
        values[1, int(column[1:])] = value
    return values


TEXT, STARTS = captions([[2, 1], [1, 1]])  # row 1: token, token, end, padding


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("text", {"text": TEXT.int()}),
        ("text", {"text": TEXT[0]}),
        ("text", {"text": TEXT.tolist()}),
        ("text", {"text": TEXT.to("meta")}),
        ("text: expected tokens", {"text": changed(TEXT, c2=7)}),  # no end
        ("text: expected tokens", {"text": changed(TEXT, c1=END)}),  # an end inside
        ("text: expected tokens", {"text": changed(TEXT, c3=7)}),  # a token after the end
        ("text: expected tokens", {"text": changed(TEXT, c0=PADDING)}),
        ("text: expected tokens", {"text": changed(TEXT, c2=PADDING, c3=END)}),
        ("text: expected tokens", {"text": changed(TEXT, c0=PADDING, c1=END, c2=7)}),
        ("word_starts", {"word_starts": STARTS.int()}),
        ("word_starts", {"word_starts": STARTS[:, :-1]}),
        ("word_starts", {"word_starts": STARTS.to("meta")}),
        ("word_starts: expected True", {"word_starts": changed(STARTS, c2=True)}),  # at the end
        ("word_starts: expected True", {"word_starts": changed(STARTS, c3=True)}),  # at padding
        ("word_starts: expected True", {"word_starts": changed(STARTS, c0=False)}),
        ("generator", {"generator": None}),
        ("generator", {"generator": 0}),
    ],
)
def test_text_that_does_not_fit_is_refused_in_one_line(name, arguments):
    usual = {"text": TEXT, "word_starts": STARTS, "generator": seeded()}
    for function, own in ((vision_language_masks, {"patches": 4}), (audio_language_masks, {"frames": [3, 4]})):
        line = refused(lambda function=function, own=own: function(**usual | own | arguments), name)
        assert line.endswith("in row 1") == ("expected" in name)


@pytest.mark.parametrize("patches", [0, -1, 4.0, True, None])
def test_a_number_of_patches_that_does_not_fit_is_refused_in_one_line(patches):
    with pytest.raises(ValueError, match=r"^patches: expected [^\n]*, got [^\n]*$"):
        vision_language_masks(TEXT, STARTS, patches, seeded())


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("frames", {"frames": [3]}),
        ("frames", {"frames": [3, 4, 5]}),
        ("frames", {"frames": [3, -1]}),
        ("frames", {"frames": [3, 4.0]}),
        ("frames", {"frames": torch.tensor([3, 4])}),
        ("width", {"width": 3}),
        ("width", {"width": 4.0}),
    ],
)
def test_clips_that_do_not_fit_are_refused_in_one_line(name, arguments):
    with pytest.raises(ValueError, match=rf"^{name}: expected [^\n]*, got [^\n]*$"):
        audio_language_masks(TEXT, STARTS, generator=seeded(), **{"frames": [3, 4], **arguments})
