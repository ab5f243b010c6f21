"""Two processes over gloo, with unlike numbers of modalities, against one process with both batches."""

import pytest
import torch
from models._mico import CAPTIONS, SAMPLES, TEXT, batch, mico

from onepeace_fast.models.mico import mask_captions
from onepeace_fast.models.mico.losses import Masked, captioning, contrast, counts_of_processes

# With two samples in a process the wrong partner of one is the other.
HALVES = ([0, 1], [2, 3])


def half(samples):
    """The batch of some samples, which are 0, 1, ... in it."""
    found, kept = {}, {}
    for name, own in SAMPLES.items():
        rows = [row for row, sample in enumerate(own) if sample in samples]
        if rows:
            whole = batch()[name]
            found[name] = whole[rows] if isinstance(whole, torch.Tensor) else [whole[row] for row in rows]
            kept[name] = [samples.index(own[row]) for row in rows]
    return {**found, "samples": kept}


def masks():
    return mask_captions(CAPTIONS, TEXT, torch.Generator().manual_seed(3))


def train(model, text, masked, given):
    parts = model.losses(text, masked=masked, generator=torch.Generator().manual_seed(0), **given)
    parts["loss"].backward()
    return {name: value.detach() for name, value in parts.items()} | {
        name: parameter.grad for name, parameter in model.named_parameters()
    }


def in_a_rank(rank, address, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    samples, masked = HALVES[rank], masks()
    found = train(mico(), CAPTIONS[samples], Masked(*(x[samples] for x in masked)), half(samples))
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_over_gloo_make_one_process_s_losses_and_gradients(tmp_path, monkeypatch):
    address = f"file://{tmp_path / 'meeting'}"
    torch.multiprocessing.spawn(in_a_rank, (address, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    monkeypatch.setattr("onepeace_fast.models.mico.losses.draw_wrong", lambda *given: [1, 0, 3, 2])
    expected = train(mico(), CAPTIONS, masks(), batch())
    assert masks().hidden[:2].sum() != masks().hidden[2:].sum()
    for name, value in expected.items():
        mean = (first[name] + second[name]) / 2
        torch.testing.assert_close(mean, value, rtol=1e-9, atol=1e-11, msg=lambda text: f"{name}: {text}")  # noqa: B023


def test_a_process_without_a_modality_gets_gradients_of_zeros_from_its_contrast():
    text = torch.nn.functional.normalize(torch.randn(3, 4, dtype=torch.float64), dim=1).requires_grad_()
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert counts_of_processes([3, 0], text.device) == [[3], [0]]
    features = {"union": (text.detach(), [0, 1, 2]), "vision": (text[:0], [])}
    loss = contrast(text, features, scale, {"union": [3], "vision": [0, 5]})
    loss.backward()
    alone = contrast(text.detach(), {"union": features["union"]}, scale.detach(), {"union": [3]})
    torch.testing.assert_close(loss.detach(), alone / 2)
    assert text.grad.any() and scale.grad != 0


def test_a_process_s_captions_count_by_their_hidden_tokens():
    masked, ids = masks(), CAPTIONS
    count = int(masked.hidden.sum())
    scores = torch.randn(count, 23, dtype=torch.float64)
    alone = captioning(scores, ids, masked, [count])
    torch.testing.assert_close(captioning(scores, ids, masked, [count, 3 * count]), alone / 2)
