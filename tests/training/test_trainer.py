"""A step of the trainer against a plain loop, and everything that must not happen in one."""

import copy
import math
import re

import pytest
import torch
from models._small import assert_same_bits

pytest.importorskip("yaml")

from training._batches import STAGES, batch_number, batches, masks_of, trainer

from onepeace_fast.training.distributed import Processes
from onepeace_fast.training.trainer import NotFinite

PLAIN = {"drop_path_rate": 0.0, "dropout": 0.0}


@pytest.mark.parametrize("stage", STAGES)
def test_two_steps_are_those_of_a_plain_loop(stage):
    """Two batches a step, a clip that bites, a warm-up of three steps from a minimum, decay of matrices."""
    keys = {"accumulation": 2, "clip": 0.05, "weight_decay": 0.2, "minimum_learning_rate": 0.004}
    trained = trainer(stage, model=PLAIN, **keys)
    model = copy.deepcopy(trained.model)
    generator = torch.Generator()
    generator.set_state(trained.masks.get_state())
    source = batches(stage)
    got = [trained.step(source) for _ in range(2)]

    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decayed = [
        p for name, p in parameters.items()
        if p.dim() > 1 and not name.endswith((".cls_embedding", ".pos_embed", ".embed_positions.weight"))
    ]  # fmt: skip
    spared = [p for p in parameters.values() if not any(p is other for other in decayed)]
    groups = [{"params": decayed, "weight_decay": 0.2}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    for step in range(2):
        losses = []
        for number in (2 * step, 2 * step + 1):
            batch = batch_number(stage, number)
            masks = masks_of(stage, batch, generator)
            inputs = {name: batch[name] for name in ("text", "image", "audio", "audio_padding") if name in batch}
            loss = getattr(model, f"{stage}_loss")(**inputs, masks=masks)["loss"]
            (loss / 2).backward()
            losses.append(loss.item())
        norm = torch.nn.utils.clip_grad_norm_([*decayed, *spared], 0.05)
        assert norm > 0.05
        rate = 0.004 + (0.01 - 0.004) * step / 3
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        assert got[step]["loss"] == pytest.approx(sum(losses) / 2, rel=1e-6)
        assert got[step]["gradient_norm"] == norm.item()
        assert got[step]["learning_rate"] == pytest.approx(rate, rel=1e-12)
    assert_same_bits(trained.weights(), model.to_upstream_state_dict())


@pytest.mark.parametrize("stage", STAGES)
def test_a_trainer_made_again_from_its_state_takes_the_same_steps(stage):
    first = trainer(stage)
    source = batches(stage)
    for _ in range(2):
        first.step(source)
    weights, state = copy.deepcopy(first.weights()), copy.deepcopy(first.state())
    wanted = [first.step(source) for _ in range(2)]

    again = trainer(stage)
    again.model.load_upstream_state_dict(weights)
    again.load_state(state)
    source = batches(stage, first=2)
    assert [again.step(source) for _ in range(2)] == wanted
    assert_same_bits(again.weights(), first.weights())
    for name, moments in first.state()["optimizer"].items():
        assert_same_bits(again.state()["optimizer"][name], moments)

    other = trainer(stage)
    other.model.load_upstream_state_dict(weights)
    other.load_state(state | {"generators": trainer(stage).state()["generators"]})
    assert other.step(batches(stage, first=2)) != wanted[0]  # so the generators matter here


@pytest.mark.parametrize("stage", STAGES)
def test_the_seed_decides(stage):
    first, same, other = (trainer(stage, seed=seed).step(batches(stage)) for seed in (1, 1, 2))
    assert same == first
    assert other["loss"] != first["loss"]


def test_stage_two_leaves_all_but_audio_and_the_decoder_as_it_was():
    trained = trainer("audio_language")
    before = copy.deepcopy(trained.weights())
    source = batches("audio_language")
    for _ in range(2):  # the first one warms up from a rate of 0
        trained.step(source)
    changed = {name for name, value in trained.weights().items() if not torch.equal(value, before[name])}
    assert "encoder_wrapper.fusion_model.layers.1.audio_ffn.3.weight" in changed
    assert "logit_scale" in changed
    frozen = {
        name for name in before
        if name.startswith(("encoder_wrapper", "text_proj", "image_proj")) and "audio" not in name
    }  # fmt: skip
    assert len(frozen) > 50
    assert not changed & frozen


@pytest.mark.parametrize(
    ("where", "value"),
    [("encoder_wrapper.image_adapter.cls_embedding", value) for value in (math.nan, math.inf)]
    + [("logit_scale", math.nan)],
)
def test_numbers_that_are_none_stop_before_anything_is_updated(where, value):
    trained = trainer("vision_language")
    source = batches("vision_language")
    for _ in range(2):
        trained.step(source)
    with torch.no_grad():
        trained.model.get_parameter(where).view(-1)[:1] = value
    before, moments = copy.deepcopy(trained.weights()), copy.deepcopy(trained.state()["optimizer"])
    with pytest.raises(NotFinite, match=r"^step 3 is not finite \(loss nan, itc_loss nan"):
        trained.step(source)
    assert trained.step_number == 2
    for name, weight in trained.weights().items():
        assert torch.equal(weight.nan_to_num(7, 7, 7), before[name].nan_to_num(7, 7, 7)), name
    for name, entry in trained.state()["optimizer"].items():
        assert_same_bits(entry, moments[name])


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_computes_coarsely_and_keeps_float32_weights(stage):
    exact, coarse = (trainer(stage, model=PLAIN, precision=name) for name in ("float32", "bfloat16"))
    wanted, got = exact.step(batches(stage)), coarse.step(batches(stage))
    assert got["loss"] != wanted["loss"]
    assert got["loss"] == pytest.approx(wanted["loss"], rel=0.02)
    assert got["gradient_norm"] == pytest.approx(wanted["gradient_norm"], rel=0.1)
    assert {weight.dtype for weight in coarse.weights().values()} == {torch.float32}
    assert coarse.state()["optimizer"].keys() == exact.state()["optimizer"].keys()  # what has had a gradient


def test_checkpointed_activations_change_nothing():
    results = []
    for flag in (False, True):
        trained, source = trainer("vision_language", model={"checkpoint_activations": flag}), batches("vision_language")
        results.append(([trained.step(source) for _ in range(2)], trained.weights()))
    assert results[1][0] == results[0][0]
    assert_same_bits(results[1][1], results[0][1])


def test_every_process_draws_by_seeds_of_its_own(monkeypatch):
    monkeypatch.setattr(Processes, "place", lambda self, model: None)
    drawn = []
    for rank in range(3):
        made = trainer("vision_language", Processes(rank, 3, torch.device("cpu")))
        drawn += [torch.initial_seed(), made.masks.initial_seed()]
    assert len(set(drawn)) == 6
    torch.manual_seed(0)


def test_a_step_trains_with_dropout_and_drop_path():
    """The model comes in evaluation mode here; with the same masks, what DropPath and dropout draw decides."""
    losses = []
    for seed in (1, 1, 2):
        trained = trainer("vision_language")
        torch.manual_seed(seed)
        losses.append(trained.step(batches("vision_language"))["loss"])
    assert losses[0] == losses[1] != losses[2]


def test_a_gradient_that_is_no_number_stops_a_step_whose_loss_is_one():
    trained = trainer("vision_language")
    trained.model.text_proj.weight.register_hook(lambda gradient: gradient * math.inf)
    before = copy.deepcopy(trained.weights())
    stopped = ""
    try:
        trained.step(batches("vision_language"))
    except NotFinite as error:
        stopped = str(error)
    assert re.match(r"step 1 is not finite \(loss \d.*, gradient_norm (nan|inf)", stopped)
    assert trained.step_number == 0
    assert_same_bits(trained.weights(), before)
