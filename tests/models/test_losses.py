"""The two pretraining losses against naive computations, and contrast over two processes against one."""

import math
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models._small import BACKENDS, batch_of, gradients_of, hide, small_model, valid_tokens

from onepeace_fast.models import pretrain
from onepeace_fast.models.losses import contrastive_loss, denoising_loss, smoothed_nll


def naive_smoothed(logits, target, smoothing):
    """Cross-entropy against 1 - eps at the target and eps / (K - 1) at each other class, one row after another."""
    total = 0.0
    for row, wanted in zip(logits.tolist(), target, strict=True):
        log_sum = math.log(sum(math.exp(value) for value in row))
        for k, value in enumerate(row):
            weight = 1 - smoothing if k == wanted else smoothing / (len(row) - 1)
            total -= weight * (value - log_sum)
    return total / len(target)


def unit(rows):
    return [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in rows]


def naive_denoising(student, teacher, valid, hidden, smoothing):
    """Every hidden token against all real tokens but CLS, with cosines at scale 2.5."""
    real = [(b, t) for b in range(valid.shape[0]) for t in range(1, valid.shape[1]) if valid[b, t]]
    keys = torch.tensor(unit([teacher[b, t].tolist() for b, t in real]), dtype=torch.float64)
    masked = [place for place in real if hidden[place]]
    queries = torch.tensor(unit([student[b, t].tolist() for b, t in masked]), dtype=torch.float64)
    return naive_smoothed(2.5 * queries @ keys.t(), [real.index(place) for place in masked], smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_smoothing_is_spread_over_the_other_classes(smoothing):
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = torch.tensor([3, 0, 6, 3])
    got = smoothed_nll(logits.log_softmax(1), target, smoothing)
    assert got.item() == pytest.approx(naive_smoothed(logits, target.tolist(), smoothing), rel=1e-12)
    if smoothing:
        torchs_own = torch.nn.functional.cross_entropy(logits, target, label_smoothing=smoothing).item()
        assert got.item() != pytest.approx(torchs_own, rel=1e-6)  # PyTorch spreads over the target too


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_denoising_contrasts_hidden_tokens_with_all_real_tokens(smoothing):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    valid = torch.arange(6) < torch.tensor([6, 3, 5])[:, None]
    hidden = (torch.rand(3, 6, generator=generator) < 0.5) & valid
    hidden[:, 0], hidden[:, 1] = True, True  # CLS is excluded whatever the mask says
    counts = (int(valid[:, 1:].sum()), int(hidden[:, 1:].sum()))
    student, teacher = student.requires_grad_(), teacher.requires_grad_()
    loss = denoising_loss(student, teacher, valid, counts[0], hidden, counts[1], smoothing)
    assert loss.item() == pytest.approx(naive_denoising(student, teacher, valid, hidden, smoothing), rel=1e-12)
    loss.backward()
    assert teacher.grad is None
    used = (hidden & (torch.arange(6) > 0)).tolist()
    assert student.grad.ne(0).any(-1).tolist() == used


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_vision_language_loss_is_made_of_the_models_own_parts(backend):
    batch = batch_of(text=[7, 2, 5], image=(3, 3))
    model, valid = small_model(backend), valid_tokens(batch)
    alone, pair = hide(batch, seed=1), hide(batch, seed=2)
    masks = {"text": alone["text"], "image": alone["image"], "vl_text": pair["text"], "vl_image": pair["image"]}
    with torch.no_grad():
        losses = model.vision_language_loss(**batch, masks=masks, label_smoothing=0.1)
        together, rebuilt = model.encode(**batch), model.reconstruct(**batch, masks=pair)
        naive = {}
        for name in ("text", "image"):
            one = {name: batch[name]}
            teacher, student = model.encode(**one), model.reconstruct(**one, masks={name: alone[name]})
            for key, s, t, mask in (("", student, teacher, alone), ("vl_", rebuilt, together, pair)):
                naive[f"dcl_{key}{name}_loss"] = naive_denoising(s[name], t[name], valid[name], mask[name], 0.1)
        logits = model.embed(image=batch["image"]) @ model.embed(text=batch["text"]).t() / 0.07
        naive["itc_loss"] = sum(naive_smoothed(side, range(3), 0.0) for side in (logits, logits.t())) / 2
    for name, value in naive.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-6), name  # the scale is a float32's 1 / 0.07
    weights = {
        "itc_loss": 1,
        "dcl_text_loss": 0.5,
        "dcl_image_loss": 1,
        "dcl_vl_text_loss": 0.5,
        "dcl_vl_image_loss": 0.5,
    }
    assert losses["loss"].item() == pytest.approx(sum(weights[k] * losses[k].item() for k in weights), rel=1e-12)
    assert losses["i2t_ncorrect"].item() == sum(logits.argmax(1).tolist()[i] == i for i in range(3))
    assert losses["t2i_ncorrect"].item() == sum(logits.t().argmax(1).tolist()[i] == i for i in range(3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_audio_language_loss_holds_both_audio_terms_against_the_pair(backend):
    batch = batch_of(text=[7, 2, 5], audio=[9, 4, 6])
    model, valid = small_model(backend), valid_tokens(batch)
    alone, pair = hide(batch, seed=1), hide(batch, seed=2)
    masks = {"audio": alone["audio"], "al_text": pair["text"], "al_audio": pair["audio"]}
    audio = {"audio": batch["audio"], "audio_padding": batch["audio_padding"]}
    with torch.no_grad():
        losses = model.audio_language_loss(**batch, masks=masks, label_smoothing=0.1)
        together, rebuilt = model.encode(**batch), model.reconstruct(**batch, masks=pair)
        student = model.reconstruct(**audio, masks={"audio": alone["audio"]})
        naive = {
            "dcl_audio_loss": naive_denoising(student["audio"], together["audio"], valid["audio"], alone["audio"], 0.1),
            "dcl_al_text_loss": naive_denoising(rebuilt["text"], together["text"], valid["text"], pair["text"], 0.1),
            "dcl_al_audio_loss": naive_denoising(
                rebuilt["audio"], together["audio"], valid["audio"], pair["audio"], 0.1
            ),
        }
        logits = model.embed(**audio) @ model.embed(text=batch["text"]).t() / 0.07
        naive["atc_loss"] = sum(naive_smoothed(side, range(3), 0.0) for side in (logits, logits.t())) / 2
    for name, value in naive.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-6), name
    weights = {"atc_loss": 1, "dcl_audio_loss": 1, "dcl_al_text_loss": 0.5, "dcl_al_audio_loss": 0.5}
    assert losses["loss"].item() == pytest.approx(sum(weights[k] * losses[k].item() for k in weights), rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_contrast_with_audio_gives_the_text_side_no_gradient(backend):
    batch = batch_of(text=[7, 2, 5], audio=[9, 4, 6])
    model, masks = small_model(backend), hide(batch)
    masks = {"audio": masks["audio"], "al_text": masks["text"], "al_audio": masks["audio"]}
    gradients = gradients_of(model, model.audio_language_loss(**batch, masks=masks)["atc_loss"])
    assert gradients["audio_proj.weight"].any()
    assert not [name for name, grad in gradients.items() if "text" in name and grad.any()]


@pytest.mark.parametrize(("start", "clamped"), [(-3.0, 0.0), (2.0, 2.0), (7.0, math.log(100))])
def test_the_logit_scale_is_clamped_in_place(start, clamped):
    batch, model = batch_of(text=[3, 2], image=(2, 2)), small_model("fused")
    masks = hide(batch)
    with torch.no_grad():
        model.logit_scale.fill_(start)
    losses = model.vision_language_loss(
        **batch, masks={**masks, **{f"vl_{name}": mask for name, mask in masks.items()}}
    )
    assert model.logit_scale.item() == pytest.approx(clamped, abs=1e-12)
    assert losses["logit_scale_exp"].item() == pytest.approx(math.exp(clamped), rel=1e-12)
    losses["loss"].backward()
    assert model.logit_scale.grad.item() != 0


def tower_inputs(rows):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(4, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    return a, b, weight, torch.tensor(2.0, dtype=torch.float64, requires_grad=True)


def contrast(a, b, weight, scale):
    """Loss, hits, and gradients of the weight and the scale."""
    towers = (torch.nn.functional.normalize(x @ weight.t(), dim=1) for x in (a, b))
    loss, hits_a, hits_b = contrastive_loss(*towers, scale.exp())
    loss.backward()
    return torch.stack([loss.detach(), hits_a, hits_b]), weight.grad, scale.grad


def one_of_two(rank, port, rows, results):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    a, b, weight, scale = tower_inputs(2 * rows)
    mine = slice(rank * rows, (rank + 1) * rows)
    values = contrast(a[mine], b[mine], weight, scale)
    for value in values:
        dist.all_reduce(value)
    if rank == 0:
        results.put([value.tolist() for value in values])
    dist.destroy_process_group()


@pytest.mark.slow
def test_contrast_over_two_processes_equals_one_with_all_rows():
    rows = 3
    values, weight_gradient, scale_gradient = contrast(*tower_inputs(2 * rows))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    workers = mp.spawn(one_of_two, (port, rows, results), nprocs=2, join=False)
    while not workers.join(timeout=60):
        pass
    summed = [torch.tensor(value, dtype=torch.float64) for value in results.get()]
    torch.testing.assert_close(summed[0] / torch.tensor([2, 1, 1]), values)  # losses are averaged, hits are counted
    torch.testing.assert_close(summed[1] / 2, weight_gradient)
    torch.testing.assert_close(summed[2] / 2, scale_gradient)


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_holds_its_rows_against_the_keys_of_all(rank, monkeypatch):
    """The same without processes: the other rank's rows come from a stand-in for the gathering."""
    rows = 3
    a, b, weight, scale = tower_inputs(2 * rows)
    towers = [torch.nn.functional.normalize(x @ weight.t(), dim=1) for x in (a, b)]

    def gather(gathered, local):
        tower = next(t for t in towers if torch.equal(t[rank * rows : (rank + 1) * rows], local))
        for target, part in zip(gathered, tower.detach().split(rows), strict=True):
            target.copy_(part)

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "all_gather", gather)
    mine = slice(rank * rows, (rank + 1) * rows)
    loss, *_ = contrastive_loss(towers[0][mine], towers[1][mine], scale.exp())
    logits = (scale.exp() * towers[0] @ towers[1].t()).detach()
    naive = [naive_smoothed(side[mine], list(range(2 * rows))[mine], 0.0) for side in (logits, logits.t())]
    assert loss.item() == pytest.approx(sum(naive) / 2, rel=1e-12)


@pytest.mark.parametrize(("task", "other"), [("vision_language_loss", "image"), ("audio_language_loss", "audio")])
def test_targets_are_smoothed_by_a_tenth_unless_that_is_said(task, other):
    batch = batch_of(text=[7, 2], image=(2, 3)) if other == "image" else batch_of(text=[7, 2], audio=[9, 4])
    hidden, pair = hide(batch, seed=1), f"{'v' if other == 'image' else 'a'}l"
    masks = {other: hidden[other], f"{pair}_text": hidden["text"], f"{pair}_{other}": hidden[other]}
    masks |= {"text": hidden["text"]} if other == "image" else {}
    model = small_model("fused")
    default, tenth, none = (
        model(task, **batch, masks=masks, **given)["loss"].item()
        for given in ({}, {"label_smoothing": 0.1}, {"label_smoothing": 0.0})
    )
    assert default == tenth != none


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_in_half_precision_are_normalised_in_float32_and_rounded_once(dtype):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(1, 65, 40, generator=generator).to(dtype) for _ in range(2))
    real = torch.ones(1, 65, dtype=torch.bool)
    got = denoising_loss(student, teacher, real, 64, real, 64, 0.1)

    def expected(precision):
        query, key = (
            torch.nn.functional.normalize(x[0, 1:].to(precision), dim=1).to(dtype) for x in (student, teacher)
        )
        return smoothed_nll((2.5 * query @ key.t()).float().log_softmax(1), torch.arange(64), 0.1)

    assert torch.equal(got, expected(torch.float32))
    assert not torch.equal(got, expected(dtype))


@pytest.mark.parametrize(("other", "pair", "letter"), [("image", "vl", "i"), ("audio", "al", "a")])
def test_hits_are_named_by_what_is_searched_with_and_what_for(other, pair, letter, monkeypatch):
    asked = []

    def contrast(a, b, scale):
        asked.append((a, b))
        return scale, torch.tensor(1.0), torch.tensor(2.0)  # a's rows that find theirs first, then b's

    monkeypatch.setattr(pretrain, "contrastive_loss", contrast)
    batch = batch_of(text=[7, 2], image=(2, 3)) if other == "image" else batch_of(text=[7, 2], audio=[9, 4])
    hidden, model = hide(batch, seed=1), small_model("fused")
    masks = {other: hidden[other], f"{pair}_text": hidden["text"], f"{pair}_{other}": hidden[other]}
    masks |= {"text": hidden["text"]} if other == "image" else {}
    found = model(f"{'vision' if other == 'image' else other}_language_loss", **batch, masks=masks)
    ((a, b),) = asked
    torch.testing.assert_close(a, model.embed(**{name: value for name, value in batch.items() if name != "text"}))
    torch.testing.assert_close(b, model.embed(text=batch["text"]))
    assert (found[f"{letter}2t_ncorrect"], found[f"t2{letter}_ncorrect"]) == (1, 2)
    assert found["logit_scale_exp"].item() == pytest.approx(1 / 0.07, rel=1e-6)
