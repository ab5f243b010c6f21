"""What only reading files needs stays out of the library's own import, and a missing package gives one line."""

import sys

import pytest

from onepeace_fast.data import audio, batches, image, manifest, text
from onepeace_fast.data._optional import optional
from onepeace_fast.installation import install_command

NEEDS = {
    "soundfile": lambda folder: audio.read_audio(folder / "clip.wav"),
    "scipy.signal": lambda folder: audio.read_audio(folder / "clip.wav"),
    "PIL.Image": lambda folder: image.read_image(folder / "image.png"),
    "tokenizers": lambda folder: text.Tokenizer.train(["a"], 300),
    "pyarrow": lambda folder: manifest.read_manifest(folder / "m.parquet", "image"),
}


@pytest.mark.parametrize("module", NEEDS)
def test_a_missing_package_gives_one_line_that_says_what_to_install(module, monkeypatch, tmp_path):
    for name in ("clip.wav", "image.png", "m.parquet"):
        (tmp_path / name).touch()
    if module == "scipy.signal":
        monkeypatch.setitem(sys.modules, "soundfile", object())
    monkeypatch.setitem(sys.modules, module, None)  # importing it now fails
    with pytest.raises(ImportError) as caught:
        NEEDS[module](tmp_path)
    line = str(caught.value)
    assert line.startswith(f"{module}: ")
    assert line.endswith(f"; type: {install_command('train')}")
    assert "\n" not in line


@pytest.mark.parametrize(("modality", "module"), [("image", "PIL.Image"), ("audio", "soundfile")])
def test_a_dataset_names_a_missing_package_before_the_first_batch(modality, module, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, module, None)
    entry = manifest.Entry(tmp_path / "file", "a caption", 2)
    with pytest.raises(ImportError, match=f"^{module}: "):
        batches.PairDataset([entry], None, modality, side=16 if modality == "image" else None, seed=0)


def test_a_damaged_package_is_reported_in_one_line(monkeypatch, tmp_path):
    (tmp_path / "damaged_package.py").write_text("raise OSError('libdamaged.so:\\n cannot open')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"^damaged_package: cannot be imported \(libdamaged\.so: cannot open\); "):
        optional("damaged_package")
