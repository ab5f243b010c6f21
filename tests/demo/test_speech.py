"""The spoken digits: what is said by whom, what is held out, the engine, and the cache."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy")
pytest.importorskip("sklearn")

from onepeace_fast.demo import espeak, speech, synthesis

REQUESTS = [("en-us+f3", 145, 50, "seven"), ("en+m7", 120, 35, "two"), ("en-us+f3", 145, 50, "seven")]


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """A cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "onepeace_fast"


@pytest.fixture
def engine(monkeypatch):
    """A synthesiser of tones that counts its calls."""
    calls = []

    def synthesise(requests):
        calls.append(len(requests))
        return [np.full(100 + row, row + 1, np.int16) for row in range(len(requests))]

    monkeypatch.setattr(synthesis, "synthesise", synthesise)
    return calls


def test_every_voice_says_every_digit_in_every_accent():
    clips = speech.plan()
    assert len(speech.VOICES) == len(set(speech.VOICES)) == 68
    said = Counter((clip.voice, clip.accent, clip.digit) for clip in clips)
    assert set(said.values()) == {1} and len(said) == 68 * len(speech.ACCENTS) * 10


def test_each_digit_is_said_in_all_manners_by_training_and_by_held_out_voices():
    clips = speech.plan()
    for digit in range(10):
        for held_out in (False, True):
            chosen = [c for c in clips if c.digit == digit and (c.voice in speech.HELD_OUT_VOICES) is held_out]
            assert {(clip.speed, clip.pitch) for clip in chosen} == set(speech.MANNERS)


def test_held_out_voices_are_never_trained_with(cache, engine):
    training, held_out = speech.load(speech.plan())
    assert {clip.voice for clip in held_out.clips} == set(speech.HELD_OUT_VOICES)
    assert not {clip.voice for clip in training.clips} & set(speech.HELD_OUT_VOICES)
    clips = speech.plan()
    for part in (training, held_out):  # each sound is that of its own clip
        assert all(sound[0] == clips.index(clip) + 1 for sound, clip in zip(part.sounds, part.clips, strict=True))
        assert part.labels == [clip.digit for clip in part.clips]


def test_sounds_come_from_the_cache_the_second_time(cache, engine):
    clips = speech.plan(["Annie", "adam"])
    first = speech.load(clips)
    second = speech.load(clips)
    assert engine == [100]
    for a, b in zip(first, second, strict=True):
        assert a.clips == b.clips and all(map(np.array_equal, a.sounds, b.sounds))
    assert [path.suffix for path in cache.iterdir()] == [".npz"]


@pytest.mark.parametrize("damage", ["cut", "emptied", "other"])
def test_a_damaged_cache_is_made_anew_and_said_so(cache, engine, capsys, damage):
    clips = speech.plan(["adam"])
    speech.load(clips)
    path = speech.cache_file(clips)
    if damage == "other":
        np.savez(path, samples=np.zeros(5, np.int16), lengths=[2, 2])
    else:
        path.write_bytes(path.read_bytes()[: 300 if damage == "cut" else 0])
    training, _ = speech.load(clips)
    assert len(engine) == 2 and len(training.sounds) == 50
    assert capsys.readouterr().out.count("are damaged (") == 1
    speech.load(clips)
    assert len(engine) == 2


def test_a_cache_that_cannot_be_written_costs_a_line_and_nothing_else(cache, engine, capsys):
    cache.write_text("a file where the folder should be")
    training, _ = speech.load(speech.plan(["adam"]))
    assert len(training.sounds) == 50 and capsys.readouterr().out.count("\n") == 1


def test_other_clips_have_another_cache_file(cache):
    assert speech.cache_file(speech.plan(["adam"])) != speech.cache_file(speech.plan(["zac"]))


def test_an_engine_that_fails_is_one_line(monkeypatch):
    pytest.importorskip("espeakng_loader")
    with pytest.raises(ValueError, match=r"^eSpeak NG failed \(.*no voice en-us\+nobody\)") as caught:
        synthesis.synthesise([("en-us+nobody", 145, 50, "seven")])
    assert "\n" not in str(caught.value)


def test_engine_speaks_and_says_the_same_each_time():
    pytest.importorskip("espeakng_loader")
    first, second = synthesis.synthesise(REQUESTS), synthesis.synthesise(REQUESTS)
    assert [len(clip) for clip in first] == [len(clip) for clip in second]
    assert all(map(np.array_equal, first, second))
    for clip in first:
        assert clip.dtype == np.int16 and 1600 < len(clip) < 16_000 and np.abs(clip).max() > 3000
    other = synthesis.synthesise([("en-us+f3", 145, 50, "two")])[0]
    assert len(other) != len(first[0]) or not np.array_equal(other, first[0])


def test_the_program_needs_nothing_but_the_standard_library(tmp_path):
    loader = pytest.importorskip("espeakng_loader")
    plan, output = tmp_path / "plan.json", tmp_path / "clips"
    plan.write_text(json.dumps(REQUESTS[:1]))
    command = [sys.executable, "-I", "-S", espeak.__file__, loader.get_library_path(), loader.get_data_path()]
    subprocess.run([*command, str(plan), str(output)], check=True, cwd=tmp_path)
    header, _, samples = Path(output).read_bytes().partition(b"\n")
    header = json.loads(header)
    assert header["rate"] == 22_050 and len(samples) == 2 * sum(header["samples"])
