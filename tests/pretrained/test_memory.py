"""Loading takes the model's bytes and little more, watched from outside the process that loads."""

import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("tqdm")

from pretrained._files import write_vision

from onepeace_fast import OnePeaceRetrieval, RetrievalConfig
from tools.loading_memory import LIMIT, config_of, measure, write

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's account of a process")
WIDTHS = {"embed_dim": 768, "ffn_embed_dim": 3072, "attention_heads": 12}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peak_of_anonymous_memory_is_little_above_the_model(tmp_path, dtype):
    path = tmp_path / "a.pt"
    config = config_of(4)
    write(path, replace(config, encoder=replace(config.encoder, **WIDTHS)), getattr(torch, dtype), quiet=True)
    measured = measure(path, dtype, quiet=True)
    path.unlink()
    assert measured.model_bytes > 200e6
    assert measured.file_bytes >= measured.model_bytes * (2 if dtype == "float32" else 1)
    assert 0.9 < measured.share <= LIMIT


@pytest.mark.slow
def test_so_it_is_for_a_folder_and_for_the_vision_pickle(tmp_path):
    encoder = replace(config_of(1).encoder, text=None, audio=None)
    model = OnePeaceRetrieval(RetrievalConfig(encoder=encoder))
    path = write_vision(tmp_path / "a.pkl", model)
    model.save(tmp_path / "folder")
    del model
    for place in (path, tmp_path / "folder"):
        measured = measure(place, "float32", quiet=True)
        assert measured.model_bytes > 80e6
        assert 0.9 < measured.share <= LIMIT
