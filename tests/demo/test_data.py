"""What the demo learns images and captions from, and what it keeps apart."""

from collections import Counter

import pytest
import torch

pytest.importorskip("sklearn")

from onepeace_fast.demo import data


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_held_out_digits_are_the_last_forms_of_the_file(digits):
    training, held_out = digits
    assert len(training.labels) + len(held_out.labels) == 1797
    # Every form begins by the digits in order, three times.
    assert held_out.labels[:30].tolist() == list(range(10)) * 3


def test_held_out_captions_are_not_among_those_to_learn_from():
    taught = [*data.IMAGE_TEMPLATES, *data.SOUND_TEMPLATES]
    learned = {data.caption(template, digit) for template in taught for digit in range(10)}
    held_out = {data.caption(template, digit) for template in data.HELD_OUT_TEMPLATES for digit in range(10)}
    assert len(held_out) == 10 * len(data.HELD_OUT_TEMPLATES) and not held_out & learned


def test_captions_end_by_the_end_token_and_are_padded_behind_it():
    vocabulary = data.Vocabulary()
    tokens = vocabulary.encode(["three", "a handwritten giraffe"])
    three, a, handwritten = (vocabulary.ids[word] for word in ("three", "a", "handwritten"))
    assert tokens.tolist() == [
        [three, data.END, data.PADDING, data.PADDING],
        [a, handwritten, data.UNKNOWN, data.END],
    ]
    assert min(vocabulary.ids.values()) == data.SPECIALS and max(vocabulary.ids.values()) == len(vocabulary) - 1


def test_every_group_of_a_batch_holds_each_digit_once_and_no_row_comes_twice(digits):
    rows = data.draw_rows(digits[0].labels, 3, generator())
    assert len(set(rows.tolist())) == 30
    for group in digits[0].labels[rows].split(10):
        assert group.tolist() == list(range(10))


def test_drawn_captions_always_name_their_digit_and_vary():
    labels = torch.arange(10).repeat(40)
    captions = data.draw_captions(data.SOUND_TEMPLATES, labels, generator())
    for caption, digit in zip(captions, labels.tolist(), strict=True):
        named = [word for word in caption.split() if word in (*data.NAMES, *map(str, range(10)))]
        assert named in ([str(digit)], [data.NAMES[digit]]), caption
    whole = {data.caption(template, digit) for template in data.SOUND_TEMPLATES for digit in range(10)}
    shortened = Counter(caption not in whole for caption in captions)
    assert shortened[True] > 50 and shortened[False] > 50
    assert captions == data.draw_captions(data.SOUND_TEMPLATES, labels, generator())


def test_images_are_enlarged_to_what_the_model_sees_and_moved_only_with_a_generator(digits):
    images = digits[1].images[:20]
    still, moved = data.enlarge(images), data.enlarge(images, generator())
    assert still.shape == moved.shape == (20, 3, data.SIDE, data.SIDE)
    assert still.min() >= -1 and still.max() <= 1
    assert torch.equal(still, data.enlarge(images)) and (still - moved).abs().amax((1, 2, 3)).min() > 0.1
    # The ink stays where it is: averaged over each pixel of the original, almost nothing changes.
    pooled = torch.nn.functional.avg_pool2d(still[:, :1], data.SIDE // 8)[:, 0]
    assert torch.corrcoef(torch.stack([pooled.flatten(), images.flatten()]))[0, 1] > 0.95
