"""``fuse`` on ONE-PEACE's public encoder and adapters, by a stand-in."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from onepeace_fast import FusedModel, fuse, use_backend
from onepeace_fast.fusion.families.one_peace_bias import PositionBias
from onepeace_fast.fusion.family import BACKEND, TOO_LITTLE_PADDING
from onepeace_fast.layers import norms, transformer
from onepeace_fast.tolerance import assert_within_rule
from tests.fusion._checks import (
    Case,
    assert_near,
    check_changed_part,
    check_copies,
    check_training,
    check_values_and_undo,
    losses,
    run,
    same_bits,
    widened,
)
from tests.fusion._one_peace import DIM, GRID, NAMES, VOCABULARY, Wrapper

Results = dict[str, Tensor | None]
TEXTS, FRAMES = (9, 0, 5), (4, 12, 7)


def batch(
    kind: str, seed: int = 0, texts: tuple[int, ...] = TEXTS, frames: tuple[int, ...] = FRAMES, visible: bool = False
) -> dict[str, Any]:
    """Keyword arguments of the stand-in: tokens and frames of each sample, CLS not counted; ``visible``: only some."""
    generator = torch.Generator().manual_seed(seed)
    names, samples = NAMES[kind].split(), len(texts)
    found: dict[str, Any] = {"encoder_type": kind}
    if "text" in names:
        tokens = torch.randint(4, VOCABULARY, (samples, max(texts)), generator=generator)
        found["src_tokens"] = tokens.masked_fill(torch.arange(max(texts)) >= torch.tensor(texts)[:, None], 1)
    if "image" in names:
        found["src_images"] = torch.randn(samples, 3, 2 * GRID, 2 * GRID, generator=generator)
    if "audio" in names:
        found["src_audios"] = torch.randn(samples, max(frames), 5, generator=generator)
        found["audio_padding_masks"] = torch.arange(max(frames) + 1) > torch.tensor(frames)[:, None]
    if visible:
        lengths = {"text": texts, "image": (GRID**2,) * samples, "audio": frames}
        for name in names:
            found[f"{name}_preserve_ids"] = some_of(lengths[name], generator)
    return found


def some_of(lengths: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Position ids of CLS and of about half of each sample's others, ascending; -1 behind them."""
    rows = [
        [0, *sorted((torch.randperm(length, generator=generator)[: (length + 1) // 2] + 1).tolist())]
        for length in lengths
    ]
    width = max(map(len, rows))
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows])


def case(kind: str, tables: int = 1, visible: bool = False, **options: Any) -> Case:
    return Case(lambda: Wrapper(tables, **options).eval(), partial(batch, kind, visible=visible), ("",), wide=True)


def fused_run(one: Case, model: nn.Module, given: dict[str, Any]) -> dict[str, Tensor | None]:
    with use_backend("fused"):
        return run(one, model, given)


def agree(found: Results, expected: Results, part: float = 1e-10) -> None:
    """The same results are absent, and the others are near."""
    assert {name for name, value in found.items() if value is None} == {n for n, v in expected.items() if v is None}
    for name, value in found.items():
        if value is not None:
            assert_near(name, value, expected[name], part)


def wide(kind: str, given: dict[str, Any], tables: int = 1, **options: Any) -> tuple[Case, Wrapper, Any]:
    """A case, a model and a batch in float64."""
    return case(kind), Wrapper(tables, **options).eval().double(), widened(given)


def reasons(model: nn.Module) -> set[str]:
    return {reason for part in FusedModel(model).report().parts for reason in part.own_calls}


@pytest.mark.parametrize("kind", NAMES)
def test_values_gradients_and_the_way_back(kind: str):
    check_values_and_undo(case(kind, tables=2 if kind in ("vl", "text") else 1))


def test_values_by_the_ops_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    for module in (norms, transformer):
        monkeypatch.setattr(module, "calls_modules", lambda x: False)
    check_values_and_undo(case("vl", tables=2))
    check_values_and_undo(case("al", visible=True))


@pytest.mark.parametrize("kind", ["vl", "al"])
def test_visible_tokens_have_the_bias_of_their_own_positions(kind: str):
    check_values_and_undo(case(kind, visible=True))


def test_without_a_bias_padding_is_seen_as_in_the_model_itself():
    check_values_and_undo(case("al", tables=0))


@pytest.mark.parametrize(
    "options",
    [
        {"scale_heads": False, "attn_ln": False},
        {"sub_norm": False, "normed": ("text",)},
        {"normed": ()},
        {"modalities": ("text", "image")},
        {"drop_path": 0.5},  # none in evaluation
    ],
    ids=str,
)
def test_configurations(options: dict[str, Any]):
    check_values_and_undo(case("vl", **options))


def test_copies_have_their_own_parameters_and_way_back():
    check_copies(case("al"))


@pytest.mark.parametrize("path", ["fusion_model.layers.1.vl_ffn.0.wi_1", "text_adapter.rel_pos_table_list.0"])
def test_a_hook_runs_and_so_does_the_model_s_own_code(path: str):
    check_changed_part(case("vl"), path.replace("vl", "image"))


def test_training_with_drop_path_is_the_same_run():
    check_training(case("vl", drop_path=0.4))


def test_drop_path_draws_the_numbers_of_the_layers_and_leaves_the_generator_as_they_do():
    # 0.5 and its inverse have no rounding.
    one, model, given = wide("al", batch("al", 0, (9, 1, 5, 3, 2, 8), (4, 12, 7, 1, 2, 6)), drop_path=0.5)
    model.train()
    torch.manual_seed(3)
    plain, state = run(one, model, given), torch.get_rng_state()
    fuse(model)
    torch.manual_seed(3)
    fused = fused_run(one, model, given)
    assert torch.equal(torch.get_rng_state(), state)
    agree(fused, plain)
    torch.manual_seed(4)
    other = fused_run(one, model, given)
    assert not same_bits(other["output 0"], fused["output 0"])


def test_all_hidden_states():
    for kind in NAMES:
        one, model, given = wide(kind, batch(kind) | {"return_all_hiddens": True})
        plain = run(one, model, given)
        assert sum("output" in name for name in plain) == 3
        fuse(model)
        agree(fused_run(one, model, given), plain)


def test_the_encoder_s_own_results_have_their_form_and_zeros_at_padding():
    model, given = Wrapper().eval(), batch("al")
    infos = (
        model.text_adapter(given["src_tokens"]), None,
        model.audio_adapter(given["src_audios"], given["audio_padding_masks"]),
    )  # fmt: skip
    plain = model.fusion_model(*infos, encoder_type="al")
    fuse(model)
    infos = (
        model.text_adapter(given["src_tokens"]), None,
        model.audio_adapter(given["src_audios"], given["audio_padding_masks"]),
    )  # fmt: skip
    with use_backend("fused"):
        fused = model.fusion_model(*infos, encoder_type="al")
    assert {name: type(value) for name, value in fused.items()} == {name: type(value) for name, value in plain.items()}
    assert torch.equal(fused["encoder_padding_mask"], plain["encoder_padding_mask"])
    (x,) = fused["encoder_out"]
    assert x.shape == plain["encoder_out"][0].shape
    assert x.transpose(0, 1)[fused["encoder_padding_mask"]].abs().max() == 0
    assert fused["text_encoder_states"] == fused["image_encoder_states"] == fused["audio_encoder_states"] == []


@pytest.mark.parametrize(
    ("kind", "texts", "frames"),
    [
        ("text", (3, 3, 3), FRAMES),
        ("text", (0,), FRAMES),
        ("al", (0, 4, 0), (1, 1, 1)),
        ("al", (2, 4, 3), (-1, 3, 2)),  # a sample without any audio
        ("audio", TEXTS, (1, 20, 0)),
    ],
    ids=str,
)
def test_hostile_shapes(kind: str, texts: tuple[int, ...], frames: tuple[int, ...]):
    one, model, given = wide(kind, batch(kind, 0, texts, frames))
    plain = run(one, model, given)
    fuse(model)
    agree(fused_run(one, model, given), plain)
    assert reasons(model) == set()


def test_biases_are_vectors_and_become_pairs_for_whoever_reads_them():
    model, given = Wrapper(2).eval(), batch("vl", visible=True)
    adapters = (
        lambda: model.text_adapter(given["src_tokens"], given["text_preserve_ids"]),
        lambda: model.image_adapter(given["src_images"], given["image_preserve_ids"]),
        lambda: model.text_adapter(given["src_tokens"]),
    )
    plain = [adapter()[2] for adapter in adapters]
    fuse(model)
    for expected, adapter in zip(plain, adapters, strict=True):
        bias = adapter()[2]
        assert isinstance(bias, PositionBias) and len(bias) == len(expected) == 2
        assert bias._dense is None
        assert all(torch.equal(a, b) for a, b in zip(bias, expected, strict=True))


def test_buckets_that_change_are_read_again():
    one, model, given = wide("text", batch("text"))
    fuse(model)
    before = fused_run(one, model, given)["output 0"]
    with torch.no_grad():
        model.text_adapter.rp_bucket[1:, 1:].neg_().add_(2 * 3)
    other = copy.deepcopy(model)
    FusedModel(other).undo()
    fused = fused_run(one, model, given)
    assert not same_bits(fused["output 0"], before)
    agree(fused, run(one, other, given))
    with torch.no_grad():
        model.text_adapter.rp_bucket[3, 5] = 0
    run(one, model, given)
    assert reasons(model) == {"the bias is not that of the model's own adapters"}


def declined(model: nn.Module, given: dict[str, Any], training: bool = False) -> str:
    """The reason of a call that is not fused, whose results are the model's own bit for bit."""
    one = case(given["encoder_type"])
    model.train(training)
    torch.manual_seed(0)
    plain = run(one, model, given)
    handle = fuse(model)
    torch.manual_seed(0)
    with use_backend("fused"):
        mine = run(one, model, given)
    assert all(same_bits(value, plain[name]) for name, value in mine.items())
    ((reason, calls),) = handle.report().parts[0].own_calls.items()
    assert calls == 1 and handle.report().parts[0].fused_calls == 0
    return reason


@pytest.mark.parametrize("option", ["dropout", "attention_dropout", "activation_dropout"])
def test_dropout_in_training_is_the_model_s_own_and_none_in_evaluation(option: str):
    expected = "dropout in training: its random numbers are drawn by the model's own code"
    assert declined(Wrapper(**{option: 0.3}), batch("vl"), training=True) == expected
    model = Wrapper(**{option: 0.3}).eval()
    fuse(model)
    fused_run(case("vl"), model, batch("vl"))
    assert reasons(model) == set()


def test_declined_calls():
    given = batch("text", visible=True)
    given["text_preserve_ids"][0, :2] = torch.tensor([1, 0])
    assert declined(Wrapper(), given) == "preserve_ids: expected 0, CLS, first and nowhere else"
    model = Wrapper()
    model.image_adapter.rel_pos_table_list = None
    assert declined(model, batch("vl")) == "the bias is not that of the model's own adapters"
    model = Wrapper(2)
    model.text_adapter = Wrapper(1).text_adapter
    assert declined(model, batch("vl")) == "the adapters have different numbers of bias tables"
    model = Wrapper().eval()
    fuse(model)
    info = (torch.randn(2, 3, DIM), torch.zeros(2, 3, dtype=torch.bool), [torch.zeros(2, 4, 3, 3)])
    model.fusion_model(info, None, None, encoder_type="text")
    assert reasons(model) == {"the bias is not that of the model's own adapters"}
    with pytest.raises(ValueError, match="encoder_type: expected one of"):
        model.fusion_model(info, info, info, encoder_type="val")


def test_few_padded_tokens_on_a_cpu_are_computed_by_the_model_itself():
    model, given = Wrapper().eval(), batch("text")
    one = case("text")
    plain = run(one, model, given)
    fuse(model)
    assert all(same_bits(value, plain[name]) for name, value in run(one, model, given).items())
    assert reasons(model) == {TOO_LITTLE_PADDING}


@pytest.mark.parametrize("reentrant", [True, False, None], ids=["reentrant", "not", "wrapper"])
def test_checkpoints_around_layers(reentrant: bool | None):
    one, model, given = wide("vl", batch("vl"), drop_path=0.5)
    model.train()
    torch.manual_seed(0)
    plain = run(one, model, given)
    fuse(model)
    layers: Any = model.fusion_model.layers
    for number, layer in enumerate(layers):
        if reentrant is None:
            layers[number] = checkpoint_wrapper(layer, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
        else:
            layers[number] = checkpoint_wrapper(layer, checkpoint_fn=checkpoint, use_reentrant=reentrant)
    torch.manual_seed(0)
    fused = fused_run(one, model, given)
    assert reasons(model) == set()
    agree({name.replace("_checkpoint_wrapped_module.", ""): value for name, value in fused.items()}, plain)


def test_autocast_inference_and_frozen_parameters():
    model, given = Wrapper().eval(), batch("al")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        plain = model(**given)[0]
    with torch.no_grad():
        truth = model.double()(**{name: v.double() if name == "src_audios" else v for name, v in given.items()})[0]
    model.float()
    fuse(model)
    with use_backend("fused"):
        for context in (torch.no_grad, torch.inference_mode):
            with torch.autocast("cpu", torch.bfloat16), context():
                fused = model(**given)[0]
            assert_within_rule("autocast", fused.clone(), plain, truth)
        model.requires_grad_(False)
        model.text_adapter.rel_pos_table_list.requires_grad_(True)
        model(**given)[0].square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        "text_adapter.rel_pos_table_list.0.weight"
    }
    assert reasons(model) == set()


@pytest.mark.slow
def test_compiled_layers_serve_every_batch():
    torch._dynamo.reset()
    one, model, _ = wide("vl", {})
    batches = [
        widened(batch("vl", seed, texts)) for seed, texts in enumerate([(9, 0, 5), (7, 2, 6), (8, 3, 1), (2, 11, 4)])
    ]
    plain = [run(one, model, given) for given in batches]
    fuse(model)
    for layer in model.fusion_model.layers:
        layer.compile(backend="aot_eager")
    for number, given in enumerate(batches):
        with torch._dynamo.config.patch(error_on_recompile=number >= 2):
            agree(fused_run(one, model, given), plain[number])
    assert reasons(model) == set()


def test_losses_of_steps_that_change_between_fused_and_own_code_agree():
    model = Wrapper().train()
    one = case("al")
    plain = losses(one, copy.deepcopy(model), 6)
    fuse(model)
    mine = losses(one, model, 6)
    assert mine == plain and reasons(model) == {TOO_LITTLE_PADDING}


@pytest.fixture
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_fsdp2_around_layers_and_adapters(alone: None, backend: str):
    one, model, given = wide("vl", batch("vl"), tables=2)
    plain = run(one, model, given)
    fuse(model)
    mesh = init_device_mesh("cpu", (1,))
    adapters = (model.text_adapter, model.image_adapter)
    for module in (*model.fusion_model.layers, *adapters, model):
        fully_shard(module, mesh=mesh)
    with use_backend(backend):
        sharded = run(one, model, given)
    assert reasons(model) == (set() if backend == "fused" else {BACKEND})
    agree(
        {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in sharded.items()}, plain
    )
