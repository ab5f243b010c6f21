"""The longest inputs that the documentation promises are taken, and both backends agree on them."""

import pytest
import torch
from data._refused import taken
from models._small import BACKENDS, assert_close, at_tokens, batch_of, samples_of, small_model, text_batch, valid_tokens


@pytest.mark.parametrize(
    "batch", [{"text": text_batch([513, 3])}, batch_of(audio=[1023, 5])], ids=["513 tokens", "1,023 frames"]
)
def test_the_longest_text_and_clip_are_encoded(batch):
    with taken():
        reference, fused = (small_model(backend).encode(**batch) for backend in BACKENDS)
    valid = valid_tokens(batch)
    assert_close(at_tokens(fused, valid), at_tokens(reference, valid))
    assert all(output.shape[1] in (514, 1024) for output in fused.values())


def test_the_samples_of_the_longest_clip_are_those_of_its_frames():
    adapter = small_model("fused").encoder_wrapper.audio_adapter
    longest = samples_of(1023)
    assert [adapter.frames(longest + more) for more in (-1, 0, 9, 10)] == [1022, 1023, 1023, 1024]


@pytest.mark.parametrize("edge", [0, 29])
def test_the_first_and_the_last_id_of_the_vocabulary_are_taken(edge):
    out = small_model("fused").encode(text=torch.tensor([[edge, 5]]))["text"]
    assert out.isfinite().all() and out.shape == (1, 3, 48)
