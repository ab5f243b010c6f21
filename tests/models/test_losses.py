"""The two pretraining losses against naive computations, and contrast over two ranks against one."""

import math

import pytest
import torch
import torch.distributed as dist
from models._small import BACKENDS, gradients_of, small_model, valid_tokens
from models.test_passes import TASKS, audio_language, vision_language

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


WEIGHTS = {
    "vision_language_loss": {"itc_loss": 1, "dcl_text_loss": 0.5, "dcl_image_loss": 1, "dcl_vl_text_loss": 0.5,
                             "dcl_vl_image_loss": 0.5},
    "audio_language_loss": {"atc_loss": 1, "dcl_audio_loss": 1, "dcl_al_text_loss": 0.5, "dcl_al_audio_loss": 0.5},
}  # fmt: skip


@TASKS
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_is_made_of_the_models_own_parts(backend, task):
    """The teacher of text or an image alone sees that alone; both terms of audio are held against the pair."""
    model, (name, inputs) = small_model(backend), task()
    masks, batch = inputs["masks"], {key: value for key, value in inputs.items() if key != "masks"}
    other, valid = "image" if "image" in batch else "audio", valid_tokens(batch)
    single = {part: {k: v for k, v in batch.items() if k.startswith(part)} for part in ("text", other)}
    pair = {part: next(mask for term, mask in masks.items() if term.endswith(f"l_{part}")) for part in ("text", other)}
    with torch.no_grad():
        losses = model(name, **inputs, label_smoothing=0.1)
        together, rebuilt, naive = model.encode(**batch), model.reconstruct(**batch, masks=pair), {}
        for term, mask in masks.items():
            part = term.split("_")[-1]
            student = model.reconstruct(**single[part], masks={part: mask}) if term == part else rebuilt
            teacher = model.encode(**single[part]) if term in ("text", "image") else together
            naive[f"dcl_{term}_loss"] = naive_denoising(student[part], teacher[part], valid[part], mask, 0.1)
        logits = model.embed(**single[other]) @ model.embed(**single["text"]).t() / 0.07
    contrast = f"{other[0]}tc_loss"
    naive[contrast] = sum(naive_smoothed(side, range(3), 0.0) for side in (logits, logits.t())) / 2
    weights = WEIGHTS[name]
    assert naive.keys() == weights.keys()
    for key, value in naive.items():
        assert losses[key].item() == pytest.approx(value, rel=1e-6), key  # the scale is a float32's 1 / 0.07
    assert losses["loss"].item() == pytest.approx(sum(weights[k] * losses[k].item() for k in weights), rel=1e-12)
    for key, side in ((f"{other[0]}2t_ncorrect", logits), (f"t2{other[0]}_ncorrect", logits.t())):
        assert losses[key].item() == sum(side.argmax(1).tolist()[i] == i for i in range(3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_contrast_with_audio_gives_the_text_side_no_gradient(backend):
    model, (name, inputs) = small_model(backend), audio_language()
    gradients = gradients_of(model, model(name, **inputs)["atc_loss"])
    assert gradients["audio_proj.weight"].any()
    assert not [name for name, grad in gradients.items() if "text" in name and grad.any()]


@pytest.mark.parametrize(("start", "clamped"), [(-3.0, 0.0), (2.0, 2.0), (7.0, math.log(100))])
def test_the_logit_scale_is_clamped_in_place(start, clamped):
    model, (name, inputs) = small_model("fused"), vision_language()
    with torch.no_grad():
        model.logit_scale.fill_(start)
    losses = model(name, **inputs)
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


def test_ranks_hold_their_rows_against_the_keys_of_all_and_together_equal_one_with_all_rows(monkeypatch):
    """Without processes: the other rank's rows come from a stand-in for the gathering."""
    rows, found = 3, []
    a, b, *parameters = tower_inputs(2 * rows)
    towers = [torch.nn.functional.normalize(x @ parameters[0].t(), dim=1).detach() for x in (a, b)]
    logits = parameters[1].exp().detach() * towers[0] @ towers[1].t()

    def gather(gathered, local):
        tower = next(t for t in towers if torch.equal(t[mine], local))
        for target, part in zip(gathered, tower.split(rows), strict=True):
            target.copy_(part)

    whole = contrast(a, b, *tower_inputs(2 * rows)[2:])
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather", gather)
    for rank in (0, 1):
        mine = slice(rank * rows, (rank + 1) * rows)
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        found.append(contrast(a[mine], b[mine], *tower_inputs(2 * rows)[2:]))
        naive = [naive_smoothed(side[mine], list(range(2 * rows))[mine], 0.0) for side in (logits, logits.t())]
        assert found[-1][0][0].item() == pytest.approx(sum(naive) / 2, rel=1e-12)
    values, *gradients = (sum(parts) for parts in zip(*found, strict=True))
    torch.testing.assert_close(values / torch.tensor([2, 1, 1]), whole[0])  # losses are averaged, hits are counted
    torch.testing.assert_close([gradient / 2 for gradient in gradients], list(whole[1:]))


@TASKS
def test_targets_are_smoothed_by_a_tenth_unless_that_is_said(task):
    model, (name, inputs) = small_model("fused"), task()
    default, tenth, none = (
        model(name, **inputs, **given)["loss"].item()
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


@TASKS
def test_hits_are_named_by_what_is_searched_with_and_what_for(task, monkeypatch):
    asked = []

    def contrast(a, b, scale):
        asked.append((a, b))
        return scale, torch.tensor(1.0), torch.tensor(2.0)  # a's rows that find theirs first, then b's

    monkeypatch.setattr(pretrain, "contrastive_loss", contrast)
    model, (name, inputs) = small_model("fused"), task()
    found, letter = model(name, **inputs), name[0].replace("v", "i")
    ((a, b),) = asked
    torch.testing.assert_close(a, model.embed(**{k: v for k, v in inputs.items() if k not in ("text", "masks")}))
    torch.testing.assert_close(b, model.embed(text=inputs["text"]))
    assert (found[f"{letter}2t_ncorrect"], found[f"t2{letter}_ncorrect"]) == (1, 2)
    assert found["logit_scale_exp"].item() == pytest.approx(1 / 0.07, rel=1e-6)
