"""Paths of the data: ``~`` is the home folder, and a name need not be UTF-8."""

import pytest

from onepeace_fast.data.audio import read_audio
from onepeace_fast.data.image import read_image
from onepeace_fast.data.text import Tokenizer


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    image, soundfile = pytest.importorskip("PIL.Image"), pytest.importorskip("soundfile")
    pytest.importorskip("scipy"), pytest.importorskip("tokenizers")
    monkeypatch.setenv("HOME", str(tmp_path))
    image.new("RGB", (5, 4)).save(tmp_path / "a.png")
    assert read_image("~/a.png").size == (5, 4)
    soundfile.write(tmp_path / "a.wav", [0.1, 0.2], 16000)
    assert len(read_audio("~/a.wav")) == 2
    Tokenizer.train(["a"], 260).save("~/t.json")
    assert Tokenizer.load("~/t.json").vocab_size == 260
    for read, name in ((read_image, "b.png"), (read_audio, "b.wav"), (Tokenizer.load, "b.json")):
        with pytest.raises(ValueError, match=f"^{tmp_path}/{name}: expected .*, got no file there"):
            read(f"~/{name}")


def test_a_tokenizer_s_name_need_not_be_utf_8(tmp_path):
    pytest.importorskip("tokenizers")
    path = tmp_path / "t\udcf6.json"
    Tokenizer.train(["a"], 260).save(path)
    assert Tokenizer.load(path).vocab_size == 260
