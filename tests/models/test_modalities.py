"""Any set of modalities per sample: packed against padded, and against every sample encoded alone."""

import pytest
import torch
from models._small import (
    BACKENDS,
    assert_close,
    assert_same_bits,
    batch_of,
    hide,
    losses_with_gradients,
    small_config,
    small_model,
    with_gradients,
)
from models.test_passes import audio_language, vision_language

VARIANTS = {
    "default": {},
    "head scale, norm after attention, no LayerScale": {
        "head_scale": True, "sub_layer_norm": False, "attention_layer_norm": True, "layer_scale": None,
    },
    "a table per layer, no FFN norm": {"bias_table_per_layer": True, "ffn_layer_norm": False},
}  # fmt: skip
SAMPLES = {"text": [2, 0, 3], "image": [2, 1], "audio": [3, 0, 1]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_three_modalities_in_every_sample_agree_packed_and_padded(variant):
    batch = batch_of(text=[7, 2, 5], image=(3, 4), audio=[9, 4, 6])
    config = small_config(**VARIANTS[variant])
    want, got = (with_gradients(small_model(backend, config), batch) for backend in BACKENDS)
    assert_close(got, want)
    for name in ("text", "image", "audio"):
        table = next(v for k, v in got.items() if f"{name}_adapter.rel_pos_table" in k)
        assert bool((table[-3:] != 0).all()), f"CLS entries of {name}'s table got no gradient"


def test_three_modalities_are_reconstructed_alike_packed_and_padded():
    batch = batch_of(text=[7, 2, 5], image=(3, 3), audio=[9, 4, 6])
    assert_close(*(with_gradients(small_model(b), batch, "reconstruct", masks=hide(batch)) for b in BACKENDS[::-1]))


@pytest.mark.parametrize(("grid", "tolerance"), [(3, 1e-10), (4, 1e-6)], ids=["own grid", "resampled in float32"])
def test_both_pretraining_tasks_agree_packed_and_padded(grid, tolerance):
    for task in (vision_language(grid=grid), audio_language()):
        want, got = (losses_with_gradients(small_model(backend), *task) for backend in BACKENDS)
        assert_close(got, want, tolerance)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_samples_with_different_modalities_agree_packed_and_padded(as_tensor):
    batch = batch_of(text=[7, 2, 5], image=(2, 3), audio=[9, 4, 6])
    samples = {name: torch.tensor(rows) for name, rows in SAMPLES.items()} if as_tensor else SAMPLES
    want, got = (with_gradients(small_model(backend), batch, samples=samples) for backend in BACKENDS)
    assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_with_different_modalities_equal_each_sample_encoded_alone(backend):
    lengths = [7, 2, 5]
    batch = batch_of(text=lengths, image=(2, 3), audio=[6, 6, 6])  # a clip depends on its padding: none here
    model = small_model(backend)
    with torch.no_grad():
        together = model.encode(**batch, samples=SAMPLES)
        for sample in range(4):
            rows = {name: members.index(sample) for name, members in SAMPLES.items() if sample in members}
            inputs = {name: batch[name][row : row + 1] for name, row in rows.items()}
            if "text" in rows:
                inputs["text"] = inputs["text"][:, : lengths[rows["text"]]]
            alone = model.encode(**inputs)
            got = {name: together[name][row : row + 1, : alone[name].shape[1]] for name, row in rows.items()}
            assert_close(got, alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_given_in_order_change_nothing_and_wrongly_paired_ones_do(backend):
    batch, model = batch_of(text=[7, 2, 5], image=(3, 3)), small_model(backend)
    with torch.no_grad():
        plain = model.encode(**batch)
        listed, wrong = (
            model.encode(**batch, samples={"text": text, "image": [0, 1, 2]}) for text in ([0, 1, 2], [1, 0, 2])
        )
    assert_same_bits(listed, plain)
    assert (plain["text"][:2] - wrong["text"][:2]).abs().max() > 1e-3
    assert_close({"third": wrong["text"][2, :6]}, {"third": plain["text"][2, :6]})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("names", [("text",), ("image",), ("audio",), ("text", "image", "audio")])
def test_an_empty_batch_gives_empty_results(backend, names):
    empty = batch_of(text=[], image=(0, 3), audio=[])
    model = small_model(backend)
    batch = {key: value for key, value in empty.items() if key.removesuffix("_padding") in names}
    encoded = model.encode(**batch)
    assert {name: value.shape[0] for name, value in encoded.items()} == dict.fromkeys(names, 0)
    if len(names) == 1:
        assert list(model.embed(**batch).shape) == [0, 48]


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_embedding_is_the_projected_cls_of_unit_length(backend):
    batch, model = batch_of(text=[7, 2]), small_model(backend)
    with torch.no_grad():
        cls = model.encode(**batch)["text"][:, 0]
        want = model.text_proj(cls)
        assert_close({"embedding": model.embed(**batch)}, {"embedding": want / want.norm(dim=1, keepdim=True)})
