"""From sounds to what the model hears."""

import numpy as np
import pytest
import torch

from onepeace_fast.demo.waveform import MARGIN, WINDOW, loudest_second, trim, waveforms


def tone(samples, loudness=8000):
    return (loudness * np.sin(np.arange(samples) / 5)).astype(np.int16)


def test_trimming_cuts_the_quiet_ends_and_nothing_between():
    sound, quiet = tone(3000), np.full(5000, 20, np.int16)
    pause = np.concatenate([quiet, sound, quiet, sound, quiet])
    trimmed = trim(pause)
    assert 11_000 - 10 <= len(trimmed) - 2 * MARGIN <= 11_000
    assert np.array_equal(trimmed, pause[5000 - MARGIN + 1 :][: len(trimmed)])


@pytest.mark.parametrize("sound", [np.array([3], np.int16), tone(100), tone(40_000)])
def test_trimming_a_sound_without_quiet_ends_keeps_it(sound):
    assert np.array_equal(trim(sound)[-1:], sound[-1:]) and len(trim(sound)) >= len(sound) - 2


def test_loudest_second_is_where_the_energy_is():
    assert loudest_second(tone(WINDOW)) == 0
    sound = np.concatenate([tone(30_000, 300), tone(WINDOW), tone(20_000, 300)])
    assert abs(loudest_second(sound) - 30_000) < 20


def test_sounds_stand_in_the_middle_of_a_normalised_second():
    (heard,) = waveforms([tone(4000)])
    assert heard.shape == (WINDOW,) and heard.dtype == torch.float32
    assert abs(heard.mean()) < 1e-5 and abs(heard.var() - 1) < 1e-3
    loud = (heard - heard[0]).abs() > 0.1
    first, last = loud.nonzero()[0].item(), loud.nonzero()[-1].item()
    assert abs(first - 6000) < 20 and abs(last - 10_000) < 20


def test_loudness_of_a_recording_does_not_matter():
    quiet, loud = waveforms([tone(4000, 500), tone(4000, 20_000)])
    torch.testing.assert_close(quiet, loud, atol=2e-2, rtol=0)


def test_training_sounds_vary_with_the_generator_alone():
    sounds = [tone(4000), tone(WINDOW), tone(9000)]

    def drawn(seed):
        return waveforms(sounds, torch.Generator().manual_seed(seed))

    first = drawn(0)
    assert first.shape == (3, WINDOW) and first.isfinite().all()
    assert torch.equal(first, drawn(0))
    assert (first - drawn(1)).abs().amax(1).min() > 0.1
