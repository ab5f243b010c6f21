"""Masks of the denoising task: which tokens of a batch are hidden, drawn on the CPU from an explicit generator.

Source: ONE-PEACE (arXiv 2305.11172); how to round and how to draw is as in its public code. True is hidden. Column 0 is
CLS, which like the end-of-sequence token and padding is never hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from onepeace_fast.checks import describe, require, require_device, require_tensor
from onepeace_fast.data.text import END
from onepeace_fast.layers.adapters import PADDING_TOKEN

TEXT_WORDS = 0.15
IMAGE_PATCHES = 0.75
AUDIO_FRAMES = 0.55
PAIR_TEXT_TOKENS = 0.4  # beside an image
PAIR_TEXT_WORDS = 0.4  # beside audio
PAIR_IMAGE_PATCHES = 0.6875
PAIR_AUDIO_FRAMES = 0.45
SPAN = 5
SPAN_SURPLUS = 0.1  # spans overlap, so more of them are drawn than would fill the share


def vision_language_masks(
    text: Tensor, word_starts: Tensor, patches: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Draw the masks of ``OnePeacePretrain.vision_language_loss``.

    - "text": the smallest number of whole words that is at least 15% of them.
    - "image": int(0.75 * patches) patches, each set equally likely.
    - "vl_text": int(0.4 * tokens) single tokens out of those that "text" leaves visible, or all of these if they are
      fewer (upstream then takes some that "text" hides as well).
    - "vl_image": every patch that "image" leaves visible, and others up to int(0.6875 * patches).

    As in upstream, a caption of one word has it hidden in "text", and one of fewer than three tokens has nothing hidden
    in "vl_text"; a row without words, on which upstream stops, has nothing hidden at all. The loss refuses a batch in
    which a mask hides nothing.

    Args:
        text: int64 [rows, length] on the CPU, without CLS: tokens, one end-of-sequence token (2), padding (1). A row
            may also be padding alone.
        word_starts: bool [rows, length], True at the first token of each word; False elsewhere, and always at the end
            and at padding. A caption's first token begins a word.
        patches: of an image, CLS not counted.
        generator: on the CPU.

    Returns:
        bool "text", "vl_text" [rows, 1 + length] and "image", "vl_image" [rows, 1 + patches].

    Raises:
        ValueError: an argument that does not fit.
    """
    tokens = _check_text(text, word_starts)
    _check_generator(generator)
    require(type(patches) is int and patches > 0, f"patches: expected a positive integer, got {describe(patches)}")
    hidden = _hide_words(tokens, word_starts, TEXT_WORDS, generator)
    visible = tokens & ~hidden
    wanted = [int(PAIR_TEXT_TOKENS * count) for count in tokens.sum(1).tolist()]
    vl_hidden = _first(_draw(text.shape, generator).masked_fill(~visible, torch.inf), wanted) & visible

    order = _ranks(_draw((text.shape[0], patches), generator))
    alone, pair = int(IMAGE_PATCHES * patches), int(PAIR_IMAGE_PATCHES * patches)
    seen = order >= alone
    others = order < pair - (patches - alone)  # the ranks are random, so these are any of the hidden ones
    masks = {"text": hidden, "vl_text": vl_hidden, "image": ~seen, "vl_image": seen | others}
    return {name: _with_cls(mask) for name, mask in masks.items()}


def audio_language_masks(
    text: Tensor,
    word_starts: Tensor,
    frames: Sequence[int],
    generator: torch.Generator,
    width: int | None = None,
) -> dict[str, Tensor]:
    """Draw the masks of ``OnePeacePretrain.audio_language_loss``.

    - "al_text": the smallest number of whole words that is at least 40% of them.
    - "audio" and "al_audio", independent of each other, with p = 0.55 and 0.45: int(frames * (p + 0.1) / 5) centres
      drawn with replacement, each hiding itself and two frames on either side, cut at the clip's ends; then single
      frames, each as likely as any other, are shown or hidden until exactly int(frames * p) are hidden.

    A clip of one frame has nothing hidden, and so has a row without words, on which upstream stops.

    Args:
        text, word_starts, generator: as in ``vision_language_masks``.
        frames: of each row's clip, CLS not counted; 0 for none.
        width: columns of the audio masks after CLS; the most frames by default.

    Returns:
        bool "al_text" [rows, 1 + length] and "audio", "al_audio" [rows, 1 + width].

    Raises:
        ValueError: an argument that does not fit.
    """
    tokens = _check_text(text, word_starts)
    _check_generator(generator)
    if not (isinstance(frames, Sequence) and all(type(count) is int and count >= 0 for count in frames)):
        raise ValueError(f"frames: expected a list of integers, 0 or more, got {describe(frames)}")
    rows, longest = text.shape[0], max(frames, default=0)
    require(len(frames) == rows, f"frames: expected one clip for each of {rows} rows of text, got {len(frames)}")
    width = longest if width is None else width
    require(
        type(width) is int and width >= longest,
        f"width: expected an integer of at least the longest clip's {longest} frames, got {describe(width)}",
    )
    masks = {"al_text": _hide_words(tokens, word_starts, PAIR_TEXT_WORDS, generator)}
    for name, share in (("audio", AUDIO_FRAMES), ("al_audio", PAIR_AUDIO_FRAMES)):
        masks[name] = torch.zeros(rows, width, dtype=torch.bool, device="cpu")
        for row, count in enumerate(frames):
            masks[name][row, :count] = _hide_spans(count, share, generator)
    return {name: _with_cls(mask) for name, mask in masks.items()}


def _hide_words(tokens: Tensor, word_starts: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Hide ceil(share * words) whole words of each row: bool [rows, length]."""
    words = word_starts.sum(1)
    place = torch.arange(tokens.shape[1], device="cpu")
    draws = _draw(tokens.shape, generator).masked_fill(place >= words[:, None], torch.inf)
    hidden = _first(draws, [math.ceil(share * count) for count in words.tolist()])
    word = (word_starts.cumsum(1) - 1).clamp(min=0)
    return hidden.gather(1, word) & tokens


def _hide_spans(frames: int, share: float, generator: torch.Generator) -> Tensor:
    """Hide exactly int(share * frames) frames of a clip, mostly in spans: bool [frames]."""
    hidden = torch.zeros(frames, dtype=torch.bool, device="cpu")
    if not frames:
        return hidden
    count = int(frames * (share + SPAN_SURPLUS) / SPAN)
    centres = torch.randint(frames, (count,), generator=generator, device="cpu")
    reach = torch.arange(SPAN, device="cpu") - SPAN // 2
    hidden[(centres[:, None] + reach).clamp(0, frames - 1)] = True
    # Drawn numbers are below 1, so the frames of spans come first; among them, and among the rest, chance decides.
    order = _draw((1, frames), generator) + (~hidden).double()
    return _first(order, [int(frames * share)]).squeeze(0)


def _draw(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Uniform numbers in [0, 1), in float64: practically never equal."""
    return torch.rand(*shape, generator=generator, dtype=torch.float64, device="cpu")


def _ranks(draws: Tensor) -> Tensor:
    """The place of each entry of [rows, length] in its row's ascending order."""
    return draws.argsort(dim=1, stable=True).argsort(dim=1)


def _first(draws: Tensor, counts: Sequence[int]) -> Tensor:
    """True at the smallest entries of each row, as many as ``counts`` says for it."""
    return _ranks(draws) < torch.tensor(counts, dtype=torch.int64, device="cpu")[:, None]


def _with_cls(mask: Tensor) -> Tensor:
    return torch.cat([mask.new_zeros(mask.shape[0], 1), mask], dim=1)


def _check_text(text: Tensor, word_starts: Tensor) -> Tensor:
    """Raise unless captions are as described; return where they have tokens that may be hidden: bool [rows, length]."""
    for name, value, dtype in (("text", text, torch.int64), ("word_starts", word_starts, torch.bool)):
        require_tensor(name, value, (dtype,), "[rows, length]", 2)
        require_device(name, value, torch.device("cpu"))
    if word_starts.shape != text.shape:
        raise ValueError(f"word_starts: expected text's shape, {list(text.shape)}, got {list(word_starts.shape)}")
    real = text != PADDING_TOKEN
    column, last = torch.arange(text.shape[1], device="cpu"), real.sum(1, keepdim=True) - 1
    ordered = ((real == (column <= last)) & ((text == END) == (column == last))).all(1)
    if not ordered.all():
        raise ValueError(
            f"text: expected tokens, then one end-of-sequence token ({END}), then padding ({PADDING_TOKEN}), got "
            f"another order in row {_first_false(ordered)}"
        )
    tokens = real & (text != END)
    outside = word_starts & ~tokens
    fits = ~outside.any(1) & (word_starts[:, :1] == tokens[:, :1]).all(1)
    if not fits.all():
        raise ValueError(
            "word_starts: expected True at the first token and at no end or padding, got another value in row "
            f"{_first_false(fits)}"
        )
    return tokens


def _first_false(rows: Tensor) -> int:
    return rows.tolist().index(False)


def _check_generator(generator: torch.Generator) -> None:
    if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
        raise ValueError(f"generator: expected a torch.Generator on the CPU, got {describe(generator)}")
