"""``fuse`` on this library's own model."""

from __future__ import annotations

import copy

import torch

from onepeace_fast import FusedModel, fuse
from tests.models._small import small_model, text_batch


def test_the_reference_backend_becomes_the_automatic_one_and_comes_back():
    model = small_model("reference")
    tokens = text_batch([3, 9, 5])
    before = model.embed(text=tokens)
    handle = fuse(model)
    assert [*handle.parts] == ["encoder_wrapper", "decoder_wrapper"]
    assert model.encoder.backend is None
    torch.testing.assert_close(model.embed(text=tokens), before)
    other = copy.deepcopy(model)
    handle.undo()
    assert model.encoder.backend == "reference" and other.encoder.backend is None
    FusedModel(other).undo()
    assert other.encoder.backend == "reference"
    assert torch.equal(model.embed(text=tokens), before)


def test_a_handle_leaves_a_later_one_its_model():
    model = small_model("reference").eval()
    earlier = fuse(model)
    earlier.undo()
    later = fuse(model)
    earlier.undo()
    assert [part.root.backend for part in later.parts.values()] == [None] * len(later.parts)
