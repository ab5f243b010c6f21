"""Packed equals padded for lengths that nobody chose."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models._small import BACKENDS, assert_close, batch_of, hide, small_model, valid_tokens, with_gradients

MODELS = {}


def model_of(backend):
    """One model per backend; examples change no parameter."""
    if backend not in MODELS:
        MODELS[backend] = small_model(backend)
    return MODELS[backend]


@st.composite
def ragged_batches(draw):
    """Lengths of 0 to 2 tokens past a few edges, any non-empty set of modalities, and any pairing of their rows."""
    names = draw(st.sets(st.sampled_from(["text", "image", "audio"]), min_size=1))
    count = draw(st.integers(1, 4))
    rows = {name: draw(st.permutations(range(count)))[: draw(st.integers(1, count))] for name in sorted(names)}
    used = sorted(set().union(*map(set, rows.values())))
    samples = {name: [used.index(sample) for sample in members] for name, members in rows.items()}
    shape = {}
    if "text" in rows:
        shape["text"] = draw(st.lists(st.integers(0, 17), min_size=len(rows["text"]), max_size=len(rows["text"])))
    if "image" in rows:
        shape["image"] = (len(rows["image"]), draw(st.integers(1, 4)))
    if "audio" in rows:
        shape["audio"] = draw(st.lists(st.integers(1, 20), min_size=len(rows["audio"]), max_size=len(rows["audio"])))
    return shape, samples


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ragged_batches(), st.integers(0, 1000))
def test_encoding_agrees_packed_and_padded(ragged, seed):
    shape, samples = ragged
    batch = batch_of(**shape, seed=seed)
    want, got = (with_gradients(model_of(backend), batch, samples=samples) for backend in BACKENDS)
    assert_close(got, want, 1e-9)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=4),
    st.integers(1, 4),
    st.floats(0.0, 1.0),
    st.integers(0, 1000),
)
def test_reconstruction_agrees_packed_and_padded(lengths, grid, share, seed):
    batch = batch_of(text=lengths, image=(len(lengths), grid), seed=seed)
    masks, valid = hide(batch, share, seed), valid_tokens(batch)
    with torch.no_grad():
        want, got = (model_of(backend).reconstruct(**batch, masks=masks) for backend in BACKENDS)
    for name, mask in valid.items():
        assert_close({name: got[name][mask]}, {name: want[name][mask]}, 1e-9)
